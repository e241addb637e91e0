//! Protocols that evaluate language models, statistics of their results, and reports.
//!
//! | protocol | what it gives |
//! |---|---|
//! | [`perplexity`] | `gptq`: windows of one length, the mean of each, the mean of those |
//! | [`target_loss`] | the mean over all tokens that are to be learned, of instruction data for one |
//! | [`llama_cpp_perplexity`] | llama.cpp's: the second half of each window of 512 |
//! | [`word_losses`] | lm-evaluation-harness's rolling log-likelihood: [`word_perplexity`], [`byte_perplexity`], [`bits_per_byte`] |
//! | [`document_losses`] | each document alone, cut at the model's length |
//! | [`choices`] | multiple choice by log-likelihood: `acc` and `acc_norm` |
//! | [`gsm8k`] | exact match of the answers to word problems, strict and flexible |
//! | [`compare`] | divergence from another model, the full-precision one as a rule, and agreement of the likeliest tokens |
//! | [`confidences`] | how far the likeliest token's probability is from how often it is right: [`calibration_error`] |
//!
//! Items become an [`Estimate`] with its interval by [`Bootstrap`], and estimates a [`Report`].

#![forbid(unsafe_code)]

mod agreement;
mod choice;
mod error;
pub mod gsm8k;
mod perplexity;
mod report;
mod rolling;
mod score;
mod statistics;
mod whitespace;

pub use agreement::{Comparison, compare, confidences};
pub use choice::{ChoiceItem, ChoiceScore, choices, encode_pair};
pub use error::{Error, Result};
pub use perplexity::{
    Perplexity, document_losses, llama_cpp_perplexity, perplexity, target_loss, window_losses,
    word_losses,
};
pub use report::{FORMAT_VERSION, Measurement, Report};
pub use rolling::{
    ScoredDocument, ScoredWindow, bits_per_byte, byte_perplexity, llama_cpp_windows,
    rolling_windows, word_count, word_perplexity,
};
pub use score::score;
pub use statistics::{
    Bootstrap, CALIBRATION_BINS, Calibration, CalibrationBin, Estimate, calibration,
    calibration_error,
};
