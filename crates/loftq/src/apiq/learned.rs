use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;
use peft::{Adapter, Linear, Lora, Method};
use quant_core::{QuantTensor, Quantized};

use crate::fake_quant::{UniformGrid, straight_through};
use crate::{Layer, Result, Start};

/// The initial logits of the ranges.
const START: f32 = 4.0;

/// The learned parameters of a layer, and the constants that they are applied to.
#[derive(Clone, Debug)]
pub(super) struct Learned {
    pub(super) ranges: Ranges,
    /// None for a layer without an adapter.
    pub(super) factors: Option<Factors>,
    /// `[n_groups, group_size, d_out]`, with zeros in a short last group.
    weight: Tensor<3>,
    /// The upper ends of the quantizer's ranges, `[n_groups, 1, d_out]`; its scales on a symmetric grid.
    high: Tensor<3>,
    /// The lower ends; none on a symmetric grid.
    low: Option<Tensor<3>>,
    grid: UniformGrid,
    /// `σ`.
    scale: f32,
}

/// The logits of the factors of the ranges.
#[derive(Module, Debug)]
pub(super) struct Ranges {
    high: Param<Tensor<3>>,
    low: Option<Param<Tensor<3>>>,
}

#[derive(Module, Debug)]
pub(super) struct Factors {
    a: Param<Tensor<2>>,
    b: Param<Tensor<2>>,
}

impl Learned {
    pub(super) fn new(
        lora: Option<&Lora>,
        layer: &Layer<'_>,
        linear: &Linear,
        quantized: &QuantTensor,
    ) -> Result<Self> {
        let path = layer.path;
        let grid = UniformGrid::of(path, quantized)?;
        let scales = quantized.scales();
        let (high, low) = match quantized.zeros() {
            Some(zeros) => (
                scales.clone() * (zeros.clone().neg() + grid.max_code),
                Some(scales * zeros.neg()),
            ),
            None => (scales, None),
        };
        let grouped = |values: Tensor<2>| values.unsqueeze_dim::<3>(1);
        let logits = |of: &Tensor<3>| Param::from_tensor((of.zeros_like() + START).autodiff());
        let (high, low) = (grouped(high), low.map(grouped));
        let mut scale = 1.0;
        let factors = match lora {
            None => None,
            Some(lora) => {
                let Adapter::Lora(adapter) = lora.init(path, linear)? else {
                    unreachable!("LoRA makes LoRA");
                };
                scale = adapter.scale();
                let [a, b] = [adapter.a(), adapter.b()];
                let [a, b] = [a, b].map(|factor| Param::from_tensor(factor.inner().autodiff()));
                Some(Factors { a, b })
            }
        };
        Ok(Self {
            ranges: Ranges {
                high: logits(&high),
                low: low.as_ref().map(logits),
            },
            factors,
            weight: grid.grouped(layer.weight.clone()),
            high,
            low,
            grid,
            scale,
        })
    }

    /// Scales and zeros, `[n_groups, 1, d_out]`.
    fn grid(&self) -> (Tensor<3>, Option<Tensor<3>>) {
        let max_code = self.grid.max_code;
        let kept = |logits: &Param<Tensor<3>>, end: &Tensor<3>| {
            // A factor of exactly one at the start.
            let whole = sigmoid(end.zeros_like() + START).autodiff();
            sigmoid(logits.val()) / whole * end.clone().autodiff()
        };
        let high = kept(&self.ranges.high, &self.high);
        match (&self.ranges.low, &self.low) {
            (Some(logits), Some(low)) => {
                let low = kept(logits, low);
                let scales = (high - low.clone()) / max_code;
                let zeros = straight_through(low.neg() / scales.clone(), Tensor::round);
                (scales, Some(zeros.clamp(0.0, max_code)))
            }
            _ => (high, None),
        }
    }

    /// The sum of the rounded weight and the adapter, differentiable in the learned parameters.
    pub(super) fn sum(&self) -> Tensor<2> {
        let (scales, zeros) = self.grid();
        let weight = self.weight.clone().autodiff();
        let weight = self.grid.fake_quantized(weight, scales, zeros);
        match &self.factors {
            Some(Factors { a, b }) => weight + (a.val() * self.scale).matmul(b.val()),
            None => weight,
        }
    }

    /// The packed weight and the factors.
    pub(super) fn finish(self, path: &str, round: usize) -> Result<Start> {
        let (scales, zeros) = self.grid();
        let packed = self.grid.packed(path, self.weight, scales, zeros)?;
        let factors = self.factors.map(|Factors { a, b }| {
            let (a, b) = (a.val().inner(), b.val().inner());
            [a * self.scale, b]
        });
        Ok(Start::packed(Quantized::from(packed), factors, round, 0.0))
    }
}
