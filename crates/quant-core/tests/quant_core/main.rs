//! The integration tests of this crate.
//!
//! Property tests run `PROPTEST_CASES` cases each, 256 by default.

mod cases;
mod codebooks;
mod distortion;
mod format;
mod golden;
mod gram;
mod laws;
mod optq;
mod quant_tensor;
mod rtn;
