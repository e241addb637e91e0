//! The tests of whole models and of their files.
//!
//! Property tests run a number of cases in proportion to `PROPTEST_CASES`, which is 256 by default.

mod adapters;
mod allocate;
mod certificates;
mod checkpoints;
mod damage;
mod dtypes;
mod fixtures;
mod forward;
mod generate;
mod gguf;
mod gguf_adapters;
mod head;
mod interop;
mod kill;
mod merge;
mod peft_directories;
mod plan;
mod quantize;
mod refusals;
mod save;
mod smollm2;
mod stream;
mod tasks;
mod texts;
mod tokenizers;
mod training;
