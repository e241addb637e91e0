use burn::module::{Module, Param};
use burn::tensor::{Tensor, module::layer_norm};

use crate::source::Source;

/// What scales the residual stream before it is read, or after it was added to.
#[derive(Module, Debug)]
pub(crate) enum Norm {
    /// By the root mean square.
    Rms(RmsNorm),
    /// By mean and deviation.
    Layer(LayerNorm),
}

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
}

impl Norm {
    pub(crate) fn rms<S: Source>(
        path: &str,
        len: usize,
        eps: f64,
        source: &mut S,
    ) -> Result<Self, S::Error> {
        let weight = source.vector(&format!("{path}.weight"), len)?;
        Ok(Self::Rms(RmsNorm { weight, eps }))
    }

    /// Without weight and bias if it is not `affine`.
    pub(crate) fn layer<S: Source>(
        path: &str,
        len: usize,
        affine: bool,
        source: &mut S,
    ) -> Result<Self, S::Error> {
        let mut vector = |name: &str| match affine {
            true => source.vector(&format!("{path}.{name}"), len).map(Some),
            false => Ok(None),
        };
        let (weight, bias) = (vector("weight")?, vector("bias")?);
        Ok(Self::Layer(LayerNorm { weight, bias }))
    }

    pub(crate) fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        /// Of transformers' OPT.
        const EPS: f64 = 1e-5;
        match self {
            Self::Rms(norm) => kernels::rms_norm(x, norm.weight.val(), norm.eps),
            Self::Layer(LayerNorm { weight, bias }) => {
                let ones = || Tensor::ones([x.dims()[2]], (&x.device(), x.dtype()));
                let weight = weight.as_ref().map_or_else(ones, |weight| weight.val());
                let bias = bias.as_ref().map(|bias| bias.val());
                layer_norm(x, weight, bias, EPS)
            }
        }
    }

    /// Its parameters with the last parts of their names.
    pub(crate) fn vectors(&self) -> Vec<(&'static str, &Param<Tensor<1>>)> {
        match self {
            Self::Rms(norm) => vec![("weight", &norm.weight)],
            Self::Layer(norm) => {
                let weight = norm.weight.iter().map(|weight| ("weight", weight));
                let bias = norm.bias.iter().map(|bias| ("bias", bias));
                weight.chain(bias).collect()
            }
        }
    }
}
