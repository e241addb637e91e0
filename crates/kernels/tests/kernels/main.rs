//! Integration tests of `kernels`; those that count allocations are binaries of their own.

mod conformance;
mod mixed_dtypes;
