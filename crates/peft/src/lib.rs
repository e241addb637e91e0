//! Adapters on quantized models that merge without leaving the low-bit grid.
//!
//! A model joins by building its projections from [`Linear`] and listing them ([`Linears`], two
//! methods). Everything else works through that:
//!
//! | function | effect |
//! |---|---|
//! | [`attach`] | attaches a fresh adapter of a [`Method`] to each targeted layer, which changes no output |
//! | [`fit`] | trains the parameters that are not frozen, that is the adapters |
//! | [`activate`] | replaces the adapters by the [`Adapters`] of a task, and returns the former ones |
//! | [`detach`] | detaches the adapters, and returns them |
//! | [`merge`] | merges the adapters into the weights, packed ones with the same codes, and returns a [`Certificate`] |
//! | [`freeze_base`] | freezes the parameters outside of adapters, which burn makes trainable |
//!
//! | method | trained parameters | merges into a packed weight |
//! |---|---|---|
//! | [`Peqa`] | scales, zeros if asked | exactly |
//! | [`Tile`]: QA-LoRA, QA-HiRA, QA-BLoRA | a matrix that is constant over tiles | into the zeros |
//! | [`Tile::q_bara`], [`Lora`] and rsLoRA, DoRA, QLoRA, [`Bayesian`], [`Vera`] | a matrix of low rank | no: [`merge_with`] makes the weight dense, or rounds the sum and measures the loss |
//!
//! [`presets`] has the settings of the papers, [`Adapters`] reads and writes directories, PEFT's too,
//! and [`Tasks`] serves tasks that share their codes. With its [`Formats`], a packed model is saved and
//! loaded as a record of burn's.
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use peft::{Linear, Linears, Peqa, Weight};
//! use quant_core::Rtn;
//!
//! #[derive(burn::module::Module, Debug)]
//! struct Mlp {
//!     up: Linear,
//!     down: Linear,
//! }
//!
//! impl Linears for Mlp {
//!     fn linears(&self) -> Vec<(String, &Linear)> {
//!         vec![("up".into(), &self.up), ("down".into(), &self.down)]
//!     }
//!
//!     fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
//!         vec![("up".into(), &mut self.up), ("down".into(), &mut self.down)]
//!     }
//! }
//!
//! let device = Device::flex();
//! let weight = |dims: [usize; 2]| Tensor::random(dims, Distribution::Normal(0.0, 0.1), &device);
//! let mut mlp = Mlp {
//!     up: Linear::new(Weight::frozen(weight([8, 32])), None),
//!     down: Linear::new(Weight::frozen(weight([32, 8])), None),
//! };
//! for (path, linear) in mlp.linears_mut() {
//!     linear.quantize(&path, &Rtn::new().with_bits(4), None)?;
//! }
//! let attached = peft::attach(&mut mlp, &Peqa::new())?;
//! assert_eq!(attached.n_trainable, 32 + 8); // A scale for each output.
//! let certificate = peft::merge(&mut mlp)?;
//! certificate.verify(&mlp)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod adapter;
mod adapters;
mod attach;
mod batch;
mod blocks;
mod calibration;
mod causal_lm;
mod certificate;
mod checkpointing;
mod checkpoints;
mod error;
mod evaluation;
mod fingerprint;
mod fisher;
mod fit;
mod fit_config;
mod fit_report;
mod formats;
mod group;
mod layer_report;
mod learning_rate;
mod linear;
mod linears;
mod merge;
mod parameter_group;
pub mod presets;
mod python_regex;
mod recipe;
mod stage_method;
mod step;
mod targets;
mod tasks;
mod trainable;
mod trained;

pub use adapter::{
    Adapter, Bayesian, BayesianAdapter, Exactness, Lora, LoraAdapter, LowRank, Method, Peqa,
    PeqaAdapter, Pooling, Tile, TileAdapter, TileMethod, Vera, VeraAdapter,
};
pub use adapters::Adapters;
pub use attach::{Attached, activate, attach, detach};
pub use batch::{Batch, Spans};
pub use blocks::{Blocks, last_output};
pub use calibration::{Stage, Stages, State, Streams};
pub use causal_lm::{CausalLm, Head, HeadWeight, nll_of_output, token_nll};
pub use certificate::{Certificate, MergedLayer, Probe};
pub use checkpoints::Checkpoints;
pub use error::{Error, Result, failed_allocation};
pub use evaluation::{BestEvaluation, Evaluation};
pub use fingerprint::{Fingerprint, Identity};
pub use fisher::{Fisher, FisherRoots};
pub use fit::{fit, fit_in, fit_with};
pub use fit_config::{FitConfig, Optimizer, Schedule};
pub use fit_report::{FitEnd, FitReport, FitWarning};
pub use formats::Formats;
#[cfg(feature = "mpi")]
pub use group::Mpi;
pub use group::{Alone, Group, Threads};
pub use layer_report::{InitializedLayer, LayerError, LayerReport};
pub use linear::{Linear, Weight};
pub use linears::{Linears, Table, set_dropout, set_precision};
pub use merge::{MergeConfig, OffGrid, merge, merge_probed, merge_with};
pub use parameter_group::ParameterGroup;
pub use python_regex::PythonRegex;
pub use recipe::{PerLayer, Recipe, check_calibration, check_paths, check_recipe};
pub use stage_method::{LayerShape, StageMethod};
pub use step::{IntoControlFlow, Step, Training};
pub use targets::Targets;
pub use tasks::{AsModel, TaskPack, Tasks};
pub use trainable::freeze_base;
