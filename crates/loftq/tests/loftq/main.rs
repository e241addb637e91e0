//! The promises of every initialization.
//!
//! Property tests run a number of cases in proportion to `PROPTEST_CASES`, which is 256 by default.

mod apiq;
mod block_ap;
mod golden;
mod init;
mod layers;
mod llama;
mod loftq;
mod lq_lora;
mod qera;
mod refusals;
mod stream;
mod truncation;
#[path = "../../../models/tests/fixtures/word_level.rs"]
mod word_level;

use proptest::prelude::ProptestConfig;

/// A configuration of `n` cases, times `PROPTEST_CASES / 256` where that is set.
fn property(n: u32) -> ProptestConfig {
    ProptestConfig::with_cases((ProptestConfig::default().cases * n / 256).max(1))
}
