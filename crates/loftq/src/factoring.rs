use burn::tensor::Tensor;
use peft::Lora;

use crate::{Error, Layer, LowRank, Result, Truncation};

/// The adapters of a method that takes them from a decomposition, and how that is computed.
#[derive(Clone, Debug)]
pub(crate) struct Factoring {
    pub(crate) lora: Lora,
    pub(crate) truncation: Truncation,
}

impl Factoring {
    /// With the adapters' seed.
    pub(crate) fn new(lora: impl Into<Lora>) -> Self {
        let lora = lora.into();
        Self {
            truncation: Truncation {
                seed: lora.seed(),
                ..Truncation::default()
            },
            lora,
        }
    }

    /// `matrix`, of the layer's size, cut down to the rank of the adapters.
    pub(crate) fn cut(
        &self,
        layer: &Layer<'_>,
        matrix: Tensor<2>,
        start: Option<Tensor<2>>,
    ) -> Result<LowRank> {
        let (path, rank, dims) = (
            layer.path.to_string(),
            self.lora.rank(),
            layer.weight.dims(),
        );
        if rank == 0 {
            return Err(peft::Error::Setting {
                setting: "rank",
                value: "0".into(),
                expected: "at least 1",
            }
            .into());
        }
        if rank > dims[0].min(dims[1]) {
            return Err(peft::Error::Rank { path, rank, dims }.into());
        }
        let low = self.truncation.of(matrix, rank, start);
        low.ok_or(Error::NoSvd { path })
    }
}
