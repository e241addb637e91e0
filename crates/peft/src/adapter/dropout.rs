use burn::tensor::{DType, Tensor, TensorData};
use rand::Rng;

use super::tensors::layer_rng;
use crate::{Error, Result};

/// Dropout of the inputs of an adapter, while a seed is set.
///
/// The mask is a function of the seed, the path of the layer and the shape: a block that is run again
/// for its gradients drops the same inputs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Dropout {
    probability: f32,
    seed: Option<u64>,
}

impl Dropout {
    pub(super) fn new(probability: f32) -> Self {
        Self {
            probability,
            seed: None,
        }
    }

    pub(super) fn probability(&self) -> f32 {
        self.probability
    }

    pub(super) fn check(&self) -> Result<()> {
        if (0.0..1.0).contains(&self.probability) {
            return Ok(());
        }
        Err(Error::Setting {
            setting: "dropout",
            value: self.probability.to_string(),
            expected: "in 0 .. 1",
        })
    }

    pub(super) fn seed(&mut self, path: &str, seed: Option<u64>) {
        self.seed = seed.map(|seed| layer_rng(seed, path).next_u64());
    }

    pub(super) fn apply<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let Some(seed) = self.seed.filter(|_| self.probability > 0.0) else {
            return x;
        };
        let dims = x.dims();
        let kept = 1.0 / (1.0 - self.probability);
        let threshold = (f64::from(self.probability) * 2f64.powi(32)) as u32;
        let mut rng = layer_rng(seed, "");
        let mask = (0..dims.iter().product::<usize>()).map(|_| {
            if rng.next_u32() < threshold {
                0.0
            } else {
                kept
            }
        });
        let mask = TensorData::new(mask.collect::<Vec<f32>>(), dims);
        let device = x.device();
        let mask = Tensor::<D>::from_data(mask, (&device, DType::F32));
        let mask = mask.cast(x.dtype());
        x * mask
    }
}
