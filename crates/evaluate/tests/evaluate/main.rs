//! Protocols against sums by hand and against other programs, and inputs that are refused.

mod allocation;
mod heads;
mod interop;
mod protocols;
mod refusals;
mod trained;
