//! The adapters that a layer can have.
//!
//! An adapter is one file in `adapter/`: its [`Method`], its [`AdapterOps`], and one line in the list
//! of [`Adapter`].
//!
//! Layers, adapters and their list use each other: burn's derive of `Module` needs the concrete type
//! of the adapter inside the layer, a method makes an adapter from a layer, and returns it as one of
//! the list.

use burn::module::{Module, ParamId};
use burn::tensor::Tensor;
use quant_core::QuantTensor;
use serde::{Deserialize, Serialize};

use crate::{Error, Linear, Result, Targets, Weight, learning_rate};
use tensor_files::LazyTensor;

mod bayesian;
mod checks;
mod dropout;
mod exactness;
pub(crate) mod hf;
pub(crate) mod lora;
mod peqa;
mod tensors;
#[cfg(test)]
mod testing;
mod tile;
pub(crate) mod vera;

pub use bayesian::{Bayesian, BayesianAdapter};
pub use exactness::Exactness;
pub(crate) use exactness::number;
pub use lora::{Lora, LoraAdapter};
pub use peqa::{Peqa, PeqaAdapter};
pub use tile::{Pooling, Tile, TileAdapter, TileMethod};
pub use vera::{Vera, VeraAdapter};

use bayesian::BayesianSettings;
pub(crate) use checks::{check_shape, quantized};
use hf::HfLayer;
pub(crate) use lora::LoraSettings;
use peqa::PeqaSettings;
pub(crate) use tensors::{Shared, Source, floats, tensor, trained};
pub(crate) use tile::TileSettings;
use vera::VeraSettings;

/// A way to adapt a model: the layers, and the adapter of each.
///
/// A method of another crate chooses among the adapters of this one, layer by layer, and their settings.
/// It adds no kind of adapter: [`Adapter`] is closed, since burn's derive of `Module` needs the concrete
/// types of all parameters of a layer, and since files, merges and certificates have to know each kind.
///
/// # Examples
/// A LoRA whose rank is larger in the layers of attention:
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use peft::{Adapter, Error, Linear, Linears, Lora, Method, Targets, Weight};
///
/// struct RankByLayer {
///     attention: Lora,
///     others: Lora,
/// }
///
/// impl Method for RankByLayer {
///     fn targets(&self) -> &Targets {
///         &Targets::All
///     }
///
///     fn init(&self, path: &str, linear: &Linear) -> Result<Adapter, Error> {
///         if path.contains("self_attn") {
///             self.attention.init(path, linear)
///         } else {
///             self.others.init(path, linear)
///         }
///     }
/// }
///
/// # #[derive(burn::module::Module, Debug)]
/// # struct Block {
/// #     q_proj: Linear,
/// #     up_proj: Linear,
/// # }
/// #
/// # impl Linears for Block {
/// #     fn linears(&self) -> Vec<(String, &Linear)> {
/// #         vec![
/// #             ("self_attn.q_proj".into(), &self.q_proj),
/// #             ("mlp.up_proj".into(), &self.up_proj),
/// #         ]
/// #     }
/// #
/// #     fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
/// #         vec![
/// #             ("self_attn.q_proj".into(), &mut self.q_proj),
/// #             ("mlp.up_proj".into(), &mut self.up_proj),
/// #         ]
/// #     }
/// # }
/// #
/// # let linear = || Linear::new(Weight::frozen(Tensor::ones([8, 8], &Device::flex())), None);
/// # let mut model = Block { q_proj: linear(), up_proj: linear() };
/// let method = RankByLayer { attention: Lora::new(4), others: Lora::new(1) };
/// let attached = peft::attach(&mut model, &method)?;
/// assert_eq!(attached.n_trainable, 4 * (8 + 8) + (8 + 8));
/// // The layers have their adapters.
/// assert!(peft::attach(&mut model, &method).is_err());
/// # Ok::<(), Error>(())
/// ```
pub trait Method {
    /// The layers to adapt.
    fn targets(&self) -> &Targets;

    /// A fresh adapter for the layer at `path`, which changes no output.
    ///
    /// # Errors
    /// If the method cannot adapt such a layer.
    fn init(&self, path: &str, linear: &Linear) -> Result<Adapter>;

    /// Fresh adapters for layers of one model, one each, in their order.
    ///
    /// A method whose adapters share tensors implements it. A method that wraps another one forwards
    /// it, as it does [`Method::init`].
    ///
    /// # Errors
    /// As [`Method::init`].
    fn init_all(&self, layers: &[(String, &Linear)]) -> Result<Vec<Adapter>> {
        let layers = layers.iter();
        layers
            .map(|(path, linear)| self.init(path, linear))
            .collect()
    }

    /// The default learning rate of AdamW for a model of this hidden size.
    ///
    /// The rates are in one file, `learning_rate.rs`, with their reasons. A method that does not say
    /// otherwise has LoRA's.
    fn learning_rate(&self, hidden_size: usize) -> f64 {
        learning_rate::of_factors(hidden_size)
    }
}

/// Operations of the adapter of one layer.
pub(crate) trait AdapterOps {
    /// The name of the method in reports.
    fn name(&self) -> &'static str;

    /// Checks that the adapter has the dimensions and the dtype of the layer at `path`.
    fn check(&self, path: &str, linear: &Linear) -> Result<()>;

    /// Checks that the values of an adapter that fits the layer at `path` can be used with its weight.
    fn check_values(&self, _path: &str, _: &Weight) -> Result<()> {
        Ok(())
    }

    /// The output of the adapted weight, without the bias.
    ///
    /// # Shapes
    /// - `x`: `[rows, d_in]`
    /// - result: `[rows, d_out]`
    fn forward(&self, weight: &Weight, x: Tensor<2>) -> Tensor<2>;

    /// The adapted weight in floats, and a bound on the distance of an element from the exact sum.
    fn to_dense(&self, weight: &Weight) -> (Tensor<2>, Exactness);

    /// The settings that files hold beside the tensors.
    fn settings(&self) -> Settings;

    /// The tensors of this layer, with their names after the layer's path.
    fn tensors(&self) -> Vec<(&'static str, LazyTensor<'_>)>;

    /// Frozen tensors that several layers share.
    fn shared(&self) -> Vec<&Shared> {
        Vec::new()
    }

    /// The adapted packed weight on the same codes, and how near it is.
    ///
    /// # Errors
    /// [`Error::MergeIntoPacked`] if the codes cannot hold it.
    fn on_codes(&self, path: &str, _: &QuantTensor) -> Result<(QuantTensor, Exactness)> {
        Err(Error::MergeIntoPacked {
            method: self.name(),
            path: path.into(),
            reason: "the added matrix differs from weight to weight inside a group".into(),
        })
    }

    /// The trained bias that replaces the layer's, `[d_out]`.
    fn bias(&self) -> Option<Tensor<1>> {
        None
    }

    /// Computes what depends on a weight that the adapter fits, and on nothing that trains.
    fn bind(&mut self, _: &Weight) {}

    /// Parameters that LoRA+ gives a higher learning rate.
    fn fast_params(&self) -> Vec<ParamId> {
        Vec::new()
    }

    /// The term of the training loss for this layer, `[1]`.
    fn penalty(&self) -> Option<Tensor<1>> {
        None
    }

    /// Sets the seed from which dropped inputs, or gates, are drawn; nothing is drawn with `None`.
    fn seed_dropout(&mut self, _path: &str, _seed: Option<u64>) {}

    /// The adapter as PEFT's files hold it, or why they cannot.
    fn to_hf(&self) -> Result<HfLayer<'_>, String> {
        Err(format!("PEFT has no {}; use `Adapters::save`", self.name()))
    }
}

/// Declares [`Adapter`] and [`Settings`], and reaches the operations of each variant.
macro_rules! adapters {
    ($($(#[$doc:meta])* $name:ident($adapter:ident, $settings:ident),)*) => {
        /// The trainable part of an adapted layer.
        ///
        /// The list is closed: see [`Method`].
        #[allow(
            clippy::large_enum_variant,
            reason = "a handle of burn has another size with other backends; a layer has one"
        )]
        #[derive(Module, Debug)]
        pub enum Adapter {
            $($(#[$doc])* $name($adapter),)*
        }

        /// The settings of an adapter in a file.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "method", rename_all = "snake_case")]
        pub(crate) enum Settings {
            $($name($settings),)*
        }

        impl Adapter {
            pub(crate) fn ops(&self) -> &dyn AdapterOps {
                match self {
                    $(Self::$name(adapter) => adapter,)*
                }
            }

            pub(crate) fn ops_mut(&mut self) -> &mut dyn AdapterOps {
                match self {
                    $(Self::$name(adapter) => adapter,)*
                }
            }

            /// The adapter of the layer at `path`, from a file.
            pub(crate) fn read(settings: Settings, path: &str, source: &mut Source) -> Result<Self> {
                Ok(match settings {
                    $(Settings::$name(settings) => {
                        Self::$name($adapter::read(settings, path, source)?)
                    })*
                })
            }
        }
    };
}

adapters! {
    /// A matrix of low rank beside the weight.
    Lora(LoraAdapter, LoraSettings),
    /// The scales, and the zeros, of the layer's grid.
    Peqa(PeqaAdapter, PeqaSettings),
    /// A matrix that is constant over tiles of the weight.
    Tile(TileAdapter, TileSettings),
    /// A matrix of low rank that learns its rank and its bits.
    Bayesian(BayesianAdapter, BayesianSettings),
    /// A product of frozen random factors, which two vectors scale.
    Vera(VeraAdapter, VeraSettings),
}

/// A product of two factors beside the weight of a layer: `scale · x A B`.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// `A`, `[d_in, r]`.
    pub a: Tensor<2>,
    /// `B`, `[r, d_out]`.
    pub b: Tensor<2>,
    /// The factor of the product.
    pub scale: f32,
}

impl Adapter {
    /// The name of the method in reports.
    pub fn method(&self) -> &'static str {
        self.ops().name()
    }

    /// The product that the adapter adds to the output of its layer, if that is all it does.
    pub fn low_rank(&self) -> Option<LowRank> {
        match self {
            Self::Lora(adapter) if adapter.magnitude().is_none() && self.bias().is_none() => {
                Some(LowRank {
                    a: adapter.a(),
                    b: adapter.b(),
                    scale: adapter.scale(),
                })
            }
            _ => None,
        }
    }

    /// The trained bias that replaces the layer's, `[d_out]`.
    pub fn bias(&self) -> Option<Tensor<1>> {
        self.ops().bias()
    }

    /// The output of the adapted weight for `x`, `[.., d_in]`, without the bias.
    pub(crate) fn forward<const D: usize>(&self, weight: &Weight, x: Tensor<D>) -> Tensor<D> {
        let mut dims = x.dims();
        let rows = dims[..D - 1].iter().product::<usize>();
        let y = self.ops().forward(weight, x.reshape([rows, dims[D - 1]]));
        dims[D - 1] = y.dims()[1];
        y.reshape(dims)
    }

    /// Checks that the adapter can be used with the layer at `path`.
    pub(crate) fn check(&self, path: &str, linear: &Linear) -> Result<()> {
        self.ops().check(path, linear)?;
        self.ops().check_values(path, linear.weight())
    }

    /// The adapter bound to a weight that it fits.
    pub(crate) fn bound_to(mut self, weight: &Weight) -> Self {
        self.ops_mut().bind(weight);
        self
    }
}
