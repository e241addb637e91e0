//! What the examples share: the texts of the embedded model, devices and memory.

#![forbid(unsafe_code)]

pub mod corpus;
pub mod device;
pub mod embedded;
pub mod memory;
