//! Block-AP, the first phase of EfficientQAT (Chen et al. 2025, arXiv:2407.11062): weights, scales and
//! zero-points of all layers of a block trained together through the rounding.
//!
//! Its second phase trains the scales of the whole model on a task, which is [`peft::Peqa`].

mod trained;

use burn::tensor::Tensor;
use peft::{
    Batch, CausalLm, InitializedLayer, LayerShape, Linear, Linears, Recipe, Stages, Streams,
    check_calibration, check_recipe,
};
use quant_core::{Gram, Needs, Quantized};

use self::trained::{Rates, Trained};
use crate::blocks::{self, BlockMethod};
use crate::error::refused_setting;
use crate::fake_quant::check_ranges;
use crate::init::place;
use crate::{Initialization, Layer, Result, Start};

/// Trains the weights, the scales and the zero-points of all layers of a block together: Block-AP of
/// EfficientQAT. It attaches no adapters; the result is a packed model as a quantizer makes it.
///
/// The loss is the squared error of the block's output, on the inputs that reach it through packed blocks,
/// against the output of the dense block on its own inputs, as in the published code. A weight is
/// `(clamp(round(w / s) + round(z), 0, m) - round(z)) s`; gradients pass through `round` unchanged, so that
/// that of `w` is 1 within the range and 0 outside, that of `s` is `round(w / s) - w / s` within and `-z` or
/// `m - z` outside, and that of `z` is 0 within and `-s` outside. The start is the dense weight on the grid of
/// the recipe's quantizer, affine or symmetric; codes are the nearest ones in the end, whatever those of the
/// quantizer were. A block that the training makes no better keeps the weights of the quantizer.
///
/// | setting | value | source |
/// |---|---|---|
/// | passes over the calibration | 2, with a step for each batch, in their order | code |
/// | calibration | 4096 windows of 2048 tokens in batches of 2 | paper |
/// | learning rates | 1e-4 of scales and zero-points; 2e-5 of weights at 2 bits, 1e-5 above | paper |
/// | schedule | half a cosine to one twentieth of the rates | code |
/// | optimizer | AdamW with `β` of 0.9 and 0.999, without decay | code |
/// | range of scales | from a hundredth to a hundred times the first ones, which holds for small weights too | ours; 1e-4 to 1e4 in the code |
/// | parameters | the projections; norms stay as they are, which the code trains, too | ours |
///
/// A step changes a parameter by about its rate, whatever the gradient. The published rates are for thousands
/// of steps of a model whose weights are of the size of 0.02: fewer steps and larger weights take higher ones.
///
/// In memory are, for all of the calibration, the activations before and in a block through packed and through
/// dense layers, and the outputs of the dense block; the dense weights of the block, and, in `f32`, the trained
/// ones with their gradients and two moments, 16 bytes for each weight, and some 12 of its rounding, beside what
/// the block keeps of one batch for the backward pass; and the Gram and the drift of a stage.
///
/// # Examples
/// ```no_run
/// use loftq::BlockAp;
/// use peft::{Batch, Peqa};
/// use quant_core::Rtn;
/// # fn run<M: peft::CausalLm + peft::Stages>(model: &mut M, calibration: &[Batch]) -> loftq::Result<()> {
/// let rtn = Rtn::new().with_bits(2).with_group_size(64);
/// loftq::init(model, &BlockAp::new(), &rtn, calibration, |layer| {
///     println!("{}: {}", layer.report.path, layer.report.error);
/// })?;
/// // The second phase of EfficientQAT trains these.
/// peft::attach(model, &Peqa::new())?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct BlockAp {
    rounds: usize,
    of_grids: f64,
    /// By the bits of a layer if none.
    of_weights: Option<f64>,
    f16_scales: bool,
}

impl Default for BlockAp {
    fn default() -> Self {
        Self::new()
    }
}

impl BlockAp {
    /// The published settings.
    pub fn new() -> Self {
        Self {
            rounds: 2,
            of_grids: 1e-4,
            of_weights: None,
            f16_scales: false,
        }
    }

    /// Passes over the calibration for each block; 2 as published.
    pub fn with_rounds(mut self, rounds: usize) -> Self {
        self.rounds = rounds;
        self
    }

    /// The first learning rates of the scales and zero-points, and of the weights; 0 leaves them as they are. As
    /// published, 1e-4, and 2e-5 at 2 bits or 1e-5 above.
    pub fn with_learning_rates(mut self, of_grids: f64, of_weights: f64) -> Self {
        (self.of_grids, self.of_weights) = (of_grids, Some(of_weights));
        self
    }

    /// Whether scales are values of `f16`, as GPTQ checkpoints hold them; false by default. The quantizer has
    /// the same setting, for the blocks that keep its weights.
    pub fn with_f16_scales(mut self, f16_scales: bool) -> Self {
        self.f16_scales = f16_scales;
        self
    }

    fn check(&self) -> Result<()> {
        for (setting, rate) in [
            ("of_grids", self.of_grids),
            ("of_weights", self.of_weights.unwrap_or_default()),
        ] {
            if !(rate.is_finite() && rate >= 0.0) {
                return Err(refused_setting(setting, rate, "0 or more"));
            }
        }
        Ok(())
    }
}

impl<M: Stages> Initialization<M> for BlockAp {
    fn check_parts(&self, layers: &[LayerShape], recipe: &dyn Recipe) -> Result<Needs> {
        self.check()?;
        check_ranges(layers, recipe)?;
        let quantizers = layers
            .iter()
            .filter_map(|layer| recipe.quantizer(&layer.path));
        let needs = quantizers.map(|quantizer| quantizer.needs());
        // The output of the dense block is that for its own inputs.
        Ok(needs.fold(Needs::Drift, Needs::max))
    }

    fn has_adapters(&self) -> bool {
        false
    }

    fn run_part(
        &self,
        part: &mut M,
        recipe: &dyn Recipe,
        streams: &mut Streams<'_>,
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>> {
        blocks::run(self, part, recipe, streams, on_layer)
    }

    fn run(
        &self,
        model: &mut M,
        recipe: &dyn Recipe,
        calibration: &[Batch],
        on_layer: &mut dyn FnMut(&InitializedLayer),
    ) -> Result<Vec<InitializedLayer>>
    where
        M: CausalLm,
    {
        check_recipe(model, recipe, calibration)?;
        let layers = LayerShape::of(model);
        let needs = Initialization::<M>::check_parts(self, &layers, recipe)?;
        check_calibration(calibration, needs)?;
        let mut streams = Streams::start(model, calibration, needs);
        self.run_part(model, recipe, &mut streams, on_layer)
    }
}

impl BlockMethod for BlockAp {
    type Learned = Trained;

    fn rounds(&self) -> usize {
        self.rounds
    }

    fn learned(&self, layer: &Layer<'_>, _: &Linear, plain: &Quantized) -> Result<Trained> {
        let published = match plain.weight.format().bits() {
            2 => 2e-5,
            _ => 1e-5,
        };
        let rates = Rates {
            of_grids: self.of_grids,
            of_weights: self.of_weights.unwrap_or(published),
        };
        Trained::new(layer, &plain.weight, rates, self.f16_scales)
    }

    fn init_dense<M: Linears>(
        &self,
        _: &mut M,
        _: usize,
        _: Option<&Gram>,
    ) -> Result<Option<InitializedLayer>> {
        Ok(None)
    }

    fn place(
        &self,
        linear: &mut Linear,
        layer: &Layer<'_>,
        start: Start,
        plain: Tensor<2>,
        seconds: f64,
    ) -> Result<InitializedLayer> {
        place(linear, None, layer, start, plain, seconds)
    }
}
