//! Directories of models: Hugging Face's, with layers packed in one of several formats.
//!
//! Parameters that are not packed are stored in the shortest type of float that holds them exactly, so
//! that a saved model is the model, bit for bit. Each format of packed layers is a module behind
//! [`LayerFormat`](format::LayerFormat); GGUF files are a module by themselves.

mod bitsandbytes;
mod dense;
pub(crate) mod directory;
mod exact;
mod format;
mod formats;
mod gguf;
#[cfg(test)]
mod golden;
mod gptq;
mod kind;
mod load;
mod names;
mod packing;
mod parameters;
mod plan;
mod save;
mod shards;
mod stream;
mod tensors;
mod verify;

pub use dense::{Rounding, save_dense};
pub use gguf::{GgufLayer, GgufReport, GgufType, save_gguf, save_gguf_adapters};
pub use kind::{CheckpointFormat, GptqVersion};
pub use load::{load, load_as};
pub use plan::{Plan, PlannedLayer, plan};
pub use save::{check_format, save, save_as};
pub use stream::{StreamStep, Streaming, initialize_to, quantize_to};
pub use verify::load_verified;
