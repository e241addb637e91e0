//! What the examples share: texts, methods, devices, memory, tables.

#![forbid(unsafe_code)]

pub mod corpus;
pub mod device;
mod doc;
pub mod embedded;
pub mod instructions;
pub mod memory;
pub mod method;
pub mod table;
pub mod tuning;
