//! From files of records to rows of tokens for training.
//!
//! [`read_records`] → [`Template`] → [`encode`] → [`pack`], or [`pad`]: records, their texts with
//! what is to be learned of them, tokens with targets, rows; [`batch`] puts rows on a device.

mod chat;
mod examples;
mod jinja;
mod packing;
mod records;
mod template;
#[cfg(test)]
mod testing;
mod tokens;

pub use chat::Chat;
pub use examples::{Encoded, Example, Limit, TooLong, count_duplicates, encode};
pub use packing::{Row, batch, pack, pad};
pub use records::{MAX_RECORD_BYTES, Record, read_records};
pub use template::{Fields, Piece, Template};
pub use tokens::{SpecialToken, SpecialTokens};
