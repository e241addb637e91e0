use quant_core::Needs;

use crate::{InitializedLayer, Linears, Recipe, Result, Stages, Streams, Weight};

/// A method that quantizes the layers of a model stage by stage, and may attach an adapter to each.
///
/// It is run on a part of a model after the other, such as blocks that are in memory one at a time: the whole
/// model is one part, too. What it does with a layer must depend on nothing but the layer, its path and the
/// calibration that reaches it.
///
/// # Examples
/// ```no_run
/// use peft::{InitializedLayer, LayerShape, Recipe, Result, StageMethod, Stages, Streams};
/// use quant_core::{Needs, Quantizer, Rtn};
///
/// /// Quantizes each layer by its weight alone.
/// struct Rounding(Rtn);
///
/// impl<M: Stages> StageMethod<M> for Rounding {
///     fn recipe(&self) -> &dyn Recipe {
///         &self.0
///     }
///
///     fn settings(&self) -> String {
///         "rounding".into()
///     }
///
///     fn check(&self, _: &[LayerShape]) -> Result<Needs> {
///         Ok(self.0.needs())
///     }
///
///     fn has_adapters(&self) -> bool {
///         false
///     }
///
///     fn run(
///         &self,
///         part: &mut M,
///         streams: &mut Streams<'_>,
///         on_layer: &mut dyn FnMut(&InitializedLayer),
///     ) -> Result<Vec<InitializedLayer>> {
///         let mut layers = Vec::new();
///         while let Some(stage) = streams.next_stage(part) {
///             for at in stage.layers {
///                 let (path, linear) = part.linears_mut().swap_remove(at);
///                 let layer = InitializedLayer::from(linear.quantize(&path, &self.0, None)?);
///                 on_layer(&layer);
///                 layers.push(layer);
///             }
///         }
///         Ok(layers)
///     }
/// }
/// ```
pub trait StageMethod<M: Stages> {
    /// The quantizers of the layers.
    fn recipe(&self) -> &dyn Recipe;

    /// The settings besides those of the quantizers, as text: two methods of the same text do the same.
    fn settings(&self) -> String;

    /// Checks that it can be run on a model of these layers, by their shapes alone, and returns what it needs
    /// to know of their inputs.
    ///
    /// # Errors
    /// An error for a layer, a target or a setting that it refuses, or if it needs all of a model at a time.
    fn check(&self, layers: &[LayerShape]) -> Result<Needs>;

    /// Whether it attaches adapters: true unless it says otherwise.
    fn has_adapters(&self) -> bool {
        true
    }

    /// Runs it on a part that the calibration has reached, through all of its stages
    /// ([`Streams::next_stage`]), and returns the layers that it changed. `on_layer` is called with each of
    /// them.
    ///
    /// # Errors
    /// The error of a quantizer or of the method in a layer. The layers before it are changed then.
    fn run(
        &self,
        part: &mut M,
        streams: &mut Streams<'_>,
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>>;
}

/// The shape of a layer, which is known before its weight is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// The path of the layer.
    pub path: String,
    /// `[d_in, d_out]`.
    pub dims: [usize; 2],
    /// Whether its weight is packed already.
    pub is_packed: bool,
}

impl LayerShape {
    /// The shapes of the layers of a model.
    pub fn of(model: &impl Linears) -> Vec<Self> {
        let linears = model.linears().into_iter();
        let shapes = linears.map(|(path, linear)| Self {
            path,
            dims: linear.weight().dims(),
            is_packed: matches!(linear.weight(), Weight::Quant(_)),
        });
        shapes.collect()
    }
}
