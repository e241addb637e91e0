//! The code that the examples share: options, texts, methods, tables and reports.

#![forbid(unsafe_code)]

pub mod arguments;
pub mod console;
pub mod corpus;
pub mod curves;
pub mod date;
pub mod device;
mod doc;
pub mod dtype;
pub mod embedded;
pub mod format;
pub mod forms;
pub mod group;
pub mod initialization;
pub mod instructions;
pub mod interrupt;
pub mod memory;
pub mod method;
pub mod optimizer;
pub mod outcome;
pub mod progress;
pub mod rate;
pub mod settings;
pub mod stream;
pub mod table;
pub mod texts;
pub mod tfevents;
pub mod training;
pub mod training_log;
