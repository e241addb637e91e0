//! Adapter initialisations that undo the quantization error.
//!
//! A low-rank adapter usually starts at zero, so that the quantized model starts with all of its
//! rounding error. The methods of this crate choose the packed weight `Q` and the factors `A`, `B`
//! together, so that `Q + σBA` is near the dense weight `W` from the first step on: LoftQ (Li et al.
//! 2023, arXiv:2310.08659) alternates between quantizing `W - σBA` and factoring `W - Q`.
//!
//! No method is here yet.

#![forbid(unsafe_code)]
