//! The promises of the crate, over every adapter and every format, on a small language model.
//!
//! Property tests run as many cases as each states, or `PROPTEST_CASES` of them.

mod adapters;
mod attaching;
mod cases;
mod fingerprint;
mod merging;
mod model;
mod qa_lora;
mod tasks;
mod training;
mod vera;

use proptest::prelude::ProptestConfig;

/// A configuration of `n` cases, or of `PROPTEST_CASES` where that is set.
fn property(n: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = match std::env::var_os("PROPTEST_CASES") {
        Some(_) => default.cases,
        None => n,
    };
    ProptestConfig { cases, ..default }
}
