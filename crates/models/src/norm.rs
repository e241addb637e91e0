use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor, module::layer_norm};

use crate::source::{Source, Vector};

/// The kind of the norms of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) enum NormKind {
    /// Root mean square, with a weight.
    Rms { eps: f64 },
    /// Root mean square, with a weight that is one more than the one that is stored.
    RmsOffset { eps: f64 },
    /// Mean and deviation; with a weight and a bias if it is affine.
    Layer { affine: bool, eps: f64 },
}

/// A norm of the last dimension.
#[derive(Module, Debug)]
pub(crate) enum Norm {
    Rms(RmsNorm),
    RmsOffset(RmsNorm),
    Layer(LayerNorm),
}

/// Zhang and Sennrich 2019, arXiv:1910.07467.
#[derive(Module, Debug)]
pub(crate) struct RmsNorm {
    weight: Param<Tensor<1>>,
    eps: f64,
}

/// Ba et al. 2016, arXiv:1607.06450.
#[derive(Module, Debug)]
pub(crate) struct LayerNorm {
    weight: Option<Param<Tensor<1>>>,
    bias: Option<Param<Tensor<1>>>,
    eps: f64,
}

impl Norm {
    /// Builds the norm at `path` of vectors of `len`.
    pub(crate) fn build<S: Source>(
        kind: NormKind,
        path: &str,
        len: usize,
        source: &mut S,
    ) -> Result<Self, S::Error> {
        let mut vector = |kind| source.vector(path, kind, len);
        Ok(match kind {
            NormKind::Rms { eps } => Self::Rms(RmsNorm {
                weight: vector(Vector::NormWeight)?,
                eps,
            }),
            NormKind::RmsOffset { eps } => Self::RmsOffset(RmsNorm {
                weight: vector(Vector::NormOffset)?,
                eps,
            }),
            NormKind::Layer { affine: true, eps } => Self::Layer(LayerNorm {
                weight: Some(vector(Vector::NormWeight)?),
                bias: Some(vector(Vector::Bias)?),
                eps,
            }),
            NormKind::Layer { affine: false, eps } => Self::Layer(LayerNorm {
                weight: None,
                bias: None,
                eps,
            }),
        })
    }

    /// The parameters of norms of a kind.
    pub(crate) fn kinds(kind: NormKind) -> Vec<Vector> {
        match kind {
            NormKind::Rms { .. } => vec![Vector::NormWeight],
            NormKind::RmsOffset { .. } => vec![Vector::NormOffset],
            NormKind::Layer { affine: true, .. } => vec![Vector::NormWeight, Vector::Bias],
            NormKind::Layer { affine: false, .. } => Vec::new(),
        }
    }

    pub(crate) fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Rms(norm) => kernels::rms_norm(x, norm.weight.val(), norm.eps),
            Self::RmsOffset(norm) => kernels::rms_norm(x, norm.weight.val() + 1.0, norm.eps),
            Self::Layer(LayerNorm { weight, bias, eps }) => {
                // In `f32`, as the other norm.
                let dtype = x.dtype();
                let ones = || Tensor::ones([x.dims()[D - 1]], (&x.device(), DType::F32));
                let cast = |t: Tensor<1>| t.cast(dtype);
                let weight = cast(weight.as_ref().map_or_else(ones, |weight| weight.val()));
                let bias = bias.as_ref().map(|bias| cast(bias.val()));
                layer_norm(x, weight, bias, *eps)
            }
        }
    }

    /// The parameters, with their kinds.
    pub(crate) fn vectors(&self) -> Vec<(Vector, &Param<Tensor<1>>)> {
        let (kind, weight, bias) = match self {
            Self::Rms(norm) => (Vector::NormWeight, Some(&norm.weight), None),
            Self::RmsOffset(norm) => (Vector::NormOffset, Some(&norm.weight), None),
            Self::Layer(norm) => (Vector::NormWeight, norm.weight.as_ref(), norm.bias.as_ref()),
        };
        let weight = weight.map(|weight| (kind, weight));
        let bias = bias.map(|bias| (Vector::Bias, bias));
        weight.into_iter().chain(bias).collect()
    }
}
