//! The promises of every initialization.
//!
//! Property tests run as many cases as each states, or `PROPTEST_CASES` of them.

mod apiq;
mod golden;
mod init;
mod layers;
mod llama;
mod loftq;
mod lq_lora;

mod qera;
mod refusals;
mod truncation;

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
