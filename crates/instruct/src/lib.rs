//! Instruction data: records, prompt templates and packed batches.
//!
//! Records become texts by a [`Template`], texts become tokens with targets by [`encode`], and examples
//! become rows of one length by [`pack`] or [`pad`]. The loss covers the targets alone: completions, or
//! the messages of an assistant.
//!
//! | item | purpose |
//! |---|---|
//! | [`read_records`] | reads records: JSON, CSV, TSV and, with the feature `parquet`, Parquet |
//! | [`Template`] | renders a record: [`Fields`] of your own, Alpaca, GSM8K, or a [`Chat`] template |
//! | [`encode`] | tokenizes records within a [`Limit`] of tokens |
//! | [`count_duplicates`] | counts the examples that two sets share |
//! | [`pack`] | packs several examples into each row |
//! | [`pad`] | pads rows of one example each |
//! | [`batch`] | moves rows to a device |
//!
//! ```no_run
//! use burn::tensor::Device;
//! use instruct::{Limit, Template, batch, encode, pack, read_records};
//!
//! let device = Device::flex();
//! let lm = models::load("Llama-2-7b-hf", &device)?;
//! let records = read_records("train.jsonl".as_ref())?;
//! let (tokenizer, special) = (lm.tokenizer()?, lm.special_tokens()?);
//! let encoded = encode(&records, &Template::gsm8k(), tokenizer, &special, Limit::new(512))?;
//! println!("{encoded}");
//! let rows = pack(&encoded.examples, 512, lm.padding()?, 0)?;
//! let batches = rows.chunks(4).map(|rows| batch(rows, &device));
//! let batches: Vec<peft::Batch> = batches.collect::<instruct::Result<_>>()?;
//! # Ok::<(), instruct::Error>(())
//! ```

#![forbid(unsafe_code)]

mod chat;
mod error;
mod examples;
mod fields;
mod jinja;
mod packing;
mod piece;
mod records;
mod template;
#[cfg(test)]
mod testing;

pub use chat::Chat;
pub use error::{Error, RecordError, Result};
pub use examples::{Encoded, Example, Limit, TooLong, count_duplicates, encode};
pub use fields::Fields;
pub use packing::{Row, batch, pack, pad};
pub use piece::Piece;
pub use records::{MAX_RECORD_BYTES, Record, read_records};
pub use template::Template;
