//! From files of records to rows of tokens for training.
//!
//! [`read_records`] → [`Template`] → [`encode`] → [`pack`], or [`pad`]: records, their texts with
//! what is to be learned of them, tokens with targets, rows; [`batch`] puts rows on a device.
//!
//! ```no_run
//! use burn::tensor::Device;
//! use instruct::{Limit, Template, TooLong, batch, encode, pack, read_records};
//!
//! let device = Device::flex();
//! let lm = models::load("Llama-2-7b-hf", &device)?;
//! let records = read_records("train.jsonl".as_ref())?;
//! let limit = Limit {
//!     max_len: 512,
//!     too_long: TooLong::Cut,
//! };
//! let special = lm.special_tokens()?;
//! let encoded = encode(&records, &Template::gsm8k(), lm.tokenizer()?, &special, limit)?;
//! println!("{encoded}");
//! let rows = pack(&encoded.examples, 512, lm.filler()?, 0)?;
//! let batches = rows.chunks(4).map(|rows| batch(rows, &device));
//! let batches: Vec<peft::Batch> = batches.collect::<instruct::Result<_>>()?;
//! # Ok::<(), instruct::Error>(())
//! ```

#![forbid(unsafe_code)]

mod chat;
mod error;
mod examples;
mod jinja;
mod packing;
mod records;
mod template;
#[cfg(test)]
mod testing;

pub use chat::Chat;
pub use error::{Error, Result};
pub use examples::{Encoded, Example, Limit, TooLong, count_duplicates, encode};
pub use packing::{Row, batch, pack, pad};
pub use records::{MAX_RECORD_BYTES, Record, read_records};
pub use template::{Fields, Piece, Template};
