//! Decoders to quantize, adapt, generate with and save: LLaMA, Qwen3,
//! Gemma, Phi-3, OLMo 2, GPT-Neo, GPT-J and OPT.
//!
//! | item | |
//! |---|---|
//! | [`load`] | loads a Hugging Face directory: dense, packed by GPTQ or bitsandbytes, or written by [`save`]; or a GGUF file |
//! | [`load_as`] | the same, to compute in `bf16` or `f16` |
//! | [`load_verified`] | loads a directory that [`save`] wrote, and checks its files and its certificate |
//! | [`Pretrained`] | a model with its tokenizer and the other files of its directory |
//! | [`Model`], [`Config`] | a model and its shape |
//! | [`plan`] | computes the result of quantizing a directory without reading a weight, and checks formats and methods against it |
//! | [`quantize_to`] | quantizes a directory into a new one, with one block in memory at a time |
//! | [`initialize_to`] | the same with adapters, by a method of crate `loftq` |
//! | [`quantize`], [`quantize_head`] | quantize the projections, with calibration, and the head |
//! | [`quantize_within`], [`sensitivities`] | quantize to a budget of bytes, each layer in the format that the loss needs |
//! | [`generate`] | continues a text, with a [`Cache`] of keys and values |
//! | [`save`] | saves a model, which [`load`] reads back bit for bit |
//! | [`save_as`], [`save_dense`] | save a model for other programs, in a [`CheckpointFormat`] or with dense weights |
//! | [`save_gguf`] | saves a model for llama.cpp, and measures what is rounded |
//! | [`Output`] | reserves the place of a directory before the work whose result it is to hold |
//! | [`SpecialTokens`] | the tokens that begin, end and pad texts |
//!
//! ```no_run
//! use burn::tensor::Device;
//! use peft::{FitConfig, Peqa};
//! use quant_core::Optq;
//!
//! let device = Device::flex();
//! let mut lm = models::load("Llama-2-7b-hf", &device)?;
//! let text = std::fs::read_to_string("task.txt")?;
//! let batches = lm.windows(&text, 512)?.batches(4, &device);
//! let optq = Optq::new().with_group_size(128);
//! for layer in models::quantize(&mut lm.model, &optq, &batches[..32], |_| {})? {
//!     println!("{}: {}", layer.path, layer.error);
//! }
//! peft::attach(&mut lm.model, &Peqa::new())?;
//! peft::fit(&mut lm.model, &batches, &FitConfig::new(), |step, _| println!("{}", step.loss))?;
//! peft::Adapters::of(&lm.model)?.save("adapters/task")?;
//! lm.certificate = Some(peft::merge(&mut lm.model)?);
//! models::save(&lm, "Llama-2-7b-4bit-task")?;
//! models::load_verified("Llama-2-7b-4bit-task", &device)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

// Fixtures are those of the programs of tests, which name the crate.
#[cfg(test)]
extern crate self as models;

mod activation;
mod allocate;
mod architecture;
mod architectures;
mod attention;
mod checkpoint;
mod config;
mod error;
mod generate;
mod kv_cache;
mod mlp;
mod model;
mod norm;
mod positions;
mod pretrained;
mod quantize;
mod rope;
mod rope_scaling;
mod settings;
mod source;
mod special_tokens;
mod stages;
mod tokenizer;

pub use activation::Activation;
pub use allocate::{Allocation, AllocationStep, Assignment, quantize_within, sensitivities};
pub use architectures::*;
pub use checkpoint::{
    CheckpointFormat, GgufLayer, GgufReport, GgufType, GptqVersion, Plan, PlannedLayer, Rounding,
    StreamStep, Streaming, check_format, initialize_to, load, load_as, load_verified, plan,
    quantize_to, save, save_as, save_dense, save_gguf, save_gguf_adapters,
};
pub use config::Config;
pub use error::{
    CheckpointError, ConfigError, Error, GenerationError, Result, StreamError, TextError,
};
pub use generate::{Cache, Generation, generate};
pub use model::Model;
pub use positions::Positions;
pub use pretrained::{Continuation, Pretrained};
pub use quantize::{quantize, quantize_head};
pub use rope_scaling::RopeScaling;
pub use special_tokens::{SpecialToken, SpecialTokens};
pub use stages::Window;
pub use tensor_files::{FloatType, IntoOutput, Output};
pub use tokenizer::{TextStream, Tokenizer, Windows};
