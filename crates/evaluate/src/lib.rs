//! Protocols that evaluate language models, statistics of their results, and reports.
//!
//! | protocol | result |
//! |---|---|
//! | [`perplexity`] | perplexity over windows of one length, as in GPTQ |
//! | [`target_loss`] | mean loss over the targets of batches, such as those of instruction data |
//! | [`llama_cpp_perplexity`] | perplexity over the second halves of windows, as in llama.cpp |
//! | [`word_losses`] | rolling log-likelihood as in lm-evaluation-harness: [`word_perplexity`], [`byte_perplexity`], [`bits_per_byte`] |
//! | [`document_losses`] | losses of documents, each cut to the model's length |
//! | [`choices`] | multiple choice by log-likelihood: `acc` and `acc_norm` |
//! | [`gsm8k`] | exact match of the answers to word problems, strict and flexible |
//! | [`compare`] | divergence from a reference model, and agreement of the likeliest tokens |
//! | [`confidences`] | probabilities of the likeliest tokens, for the [`calibration_error`] |
//!
//! | item | purpose |
//! |---|---|
//! | [`Bootstrap`] | turns the results of items into an [`Estimate`] with a confidence interval |
//! | [`Report`] | collects estimates, and writes JSON, Markdown and SVG |
//!
//! ```no_run
//! use burn::tensor::Device;
//! use evaluate::{Bootstrap, Measurement, Report, window_losses};
//!
//! let device = Device::flex();
//! let lm = models::load("Llama-2-7b-4bit-task", &device)?;
//! let text = std::fs::read_to_string("held-out.txt")?;
//! let losses = window_losses(&lm.model, &lm.windows(&text, 2048)?.batches(1, &device))?;
//! let mut report = Report::new("Held-out text");
//! report.measurements.push(Measurement {
//!     protocol: "gptq".into(),
//!     metric: "perplexity".into(),
//!     model: "4 bits".into(),
//!     estimate: Bootstrap::new().mean(&losses)?.map(f64::exp),
//!     unit: "windows".into(),
//!     lower_is_better: true,
//! });
//! println!("{}", report.to_markdown());
//! std::fs::write("report.svg", report.to_svg())?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod agreement;
mod choice;
mod error;
pub mod gsm8k;
mod harness;
mod perplexity;
mod report;
mod rolling;
mod score;
mod statistics;
mod whitespace;

pub use agreement::{Comparison, compare, confidences};
pub use choice::{ChoiceItem, ChoiceScore, choices, encode_pair};
pub use error::{Error, Result};
pub use harness::AddBos;
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
