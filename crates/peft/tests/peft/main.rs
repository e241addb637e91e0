//! The promises of the crate, over every adapter and every format, on a small language model.
//!
//! Property tests run a number of cases in proportion to `PROPTEST_CASES`, which is 256 by default.

mod adapters;
mod attaching;
mod cases;
mod certificates;
mod evaluating;
mod fingerprint;
mod formats;
mod groups;
mod head;
mod merging;
mod model;
mod optimizers;
mod qa_lora;
mod resuming;
mod tasks;
mod training;
mod vera;

use proptest::prelude::ProptestConfig;

/// A configuration of `n` cases, times `PROPTEST_CASES / 256` where that is set.
fn property(n: u32) -> ProptestConfig {
    ProptestConfig::with_cases((ProptestConfig::default().cases * n / 256).max(1))
}
