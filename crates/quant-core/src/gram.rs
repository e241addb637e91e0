use burn::tensor::{Device, Tensor, TensorData};

use crate::quant_tensor::check_finite;
use crate::{Error, Result, linalg};

/// The running second moment of a layer's inputs, `Σ x xᵀ` over tokens.
///
/// It is OPTQ's Hessian but for a factor, `H = 2 G / n_tokens`, which cancels but for inputs that are
/// always zero.
#[derive(Clone, Debug)]
pub struct Gram {
    sum: Tensor<2>,
    drift: Option<Tensor<2>>,
    n_tokens: usize,
}

impl Gram {
    /// Of no tokens yet, for layers of `d_in` inputs.
    pub fn new(d_in: usize, device: &Device) -> Self {
        Self {
            sum: Tensor::zeros([d_in, d_in], device),
            drift: None,
            n_tokens: 0,
        }
    }

    /// One that was summed elsewhere, `[d_in, d_in]`, symmetric.
    ///
    /// # Errors
    /// [`Error::GramSize`] if it is not square.
    pub fn from_sum(sum: Tensor<2>, n_tokens: usize) -> Result<Self> {
        let [d_in, found] = sum.dims();
        if d_in != found {
            return Err(Error::GramSize { d_in, found });
        }
        Ok(Self {
            sum,
            drift: None,
            n_tokens,
        })
    }

    /// Adds the inputs `x`, `[.., d_in]`.
    ///
    /// # Panics
    /// If `x` has other inputs, or the drift is summed too.
    pub fn update<const D: usize>(&mut self, x: Tensor<D>) {
        assert!(
            self.drift.is_none(),
            "tokens without a drift after some with"
        );
        self.add(rows(x, self.d_in()));
    }

    fn add(&mut self, x: Tensor<2>) {
        self.n_tokens += x.dims()[0];
        self.sum = self.sum.clone() + x.clone().transpose().matmul(x);
    }

    /// Adds the inputs `x` and how far those of the dense model, `dense`, are from them:
    /// `Σ (dense - x) xᵀ`, for GPTAQ (Li et al. 2025, arXiv:2504.02692).
    ///
    /// # Panics
    /// If either has other inputs, they have other tokens, or there were tokens without a drift.
    pub fn update_with_drift<const D: usize>(&mut self, x: Tensor<D>, dense: Tensor<D>) {
        assert_eq!(x.dims(), dense.dims(), "the same tokens through both");
        assert!(
            self.drift.is_some() || self.n_tokens == 0,
            "tokens with a drift after some without"
        );
        let (x, dense) = (rows(x, self.d_in()), rows(dense, self.d_in()));
        let drift = (dense - x.clone()).transpose().matmul(x.clone());
        self.drift = Some(match self.drift.take() {
            Some(sum) => sum + drift,
            None => drift,
        });
        self.add(x);
    }

    /// Inputs.
    pub fn d_in(&self) -> usize {
        self.sum.dims()[0]
    }

    /// Tokens so far.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// `Σ x xᵀ`, `[d_in, d_in]`.
    pub fn sum(&self) -> Tensor<2> {
        self.sum.clone()
    }

    /// `Σ (dense - x) xᵀ`, `[d_in, d_in]`, if it was summed.
    pub fn drift(&self) -> Option<Tensor<2>> {
        self.drift.clone()
    }

    /// The energy of a layer's output, `tr(Wᵀ G W) = Σ ‖x W‖²`, for a weight `[d_in, d_out]`; with
    /// the error of a weight it is that of the output.
    ///
    /// # Panics
    /// If `weight` has other inputs.
    pub fn energy(&self, weight: Tensor<2>) -> f64 {
        let product = self.sum.clone().matmul(weight.clone()) * weight;
        // The sums of columns first: a total in f32 would lose its digits.
        kernels::with_values(product.sum_dim(0), |columns| {
            columns.iter().map(|&sum| f64::from(sum)).sum()
        })
    }

    /// A square root: the upper triangular `R`, `[d_in, d_in]`, with `Rᵀ R = G + δ I`, so that
    /// `‖R E‖² = Σ ‖x E‖²` but for `δ ‖E‖²`. `δ` is the least of 10⁻⁶, 10⁻⁴ and 10⁻² of the mean of the
    /// diagonal with which there is a Cholesky factor, in double precision: directions that no token
    /// has seen count by it. The root of a Gram of zeros is a multiple of the identity.
    ///
    /// # Errors
    /// Those of [`Gram::check`]; [`Error::NotPositive`] if there is none.
    pub fn root(&self) -> Result<Tensor<2>> {
        let d_in = self.d_in();
        self.check(d_in)?;
        for damping in [1e-6, 1e-4, 1e-2] {
            let mut sum: Vec<f64> = kernels::with_values(self.sum(), |sum| {
                sum.iter().map(|&value| f64::from(value)).collect()
            });
            let trace: f64 = sum.iter().step_by(d_in + 1).sum();
            let mean = match trace / d_in as f64 {
                0.0 => 1.0,
                mean => mean,
            };
            for moment in sum.iter_mut().step_by(d_in + 1) {
                *moment += damping * mean;
            }
            if let Ok(root) = linalg::root(sum, d_in) {
                let root = TensorData::new(root, [d_in, d_in]);
                return Ok(Tensor::from_data(root, &self.sum.device()));
            }
        }
        Err(Error::NotPositive)
    }

    /// Checks that this is the Gram of a layer of `d_in` inputs, and holds numbers that one can have.
    ///
    /// # Errors
    /// [`Error::GramSize`], [`Error::EmptyGram`], [`Error::NonFinite`] with the first such entry, or
    /// [`Error::NegativeMoment`].
    pub fn check(&self, d_in: usize) -> Result<()> {
        let found = self.d_in();
        if found != d_in {
            return Err(Error::GramSize { d_in, found });
        }
        if self.n_tokens == 0 {
            return Err(Error::EmptyGram);
        }
        kernels::with_values(self.sum(), |sum| {
            check_finite("the Gram", sum, d_in)?;
            let moments = (0..d_in).map(|i| (i, sum[i * d_in + i]));
            match moments.into_iter().find(|(_, moment)| *moment < 0.0) {
                Some((input, value)) => Err(Error::NegativeMoment { input, value }),
                None => Ok(()),
            }
        })?;
        match self.drift() {
            Some(drift) => {
                kernels::with_values(drift, |sum| check_finite("the Gram's drift", sum, d_in))
            }
            None => Ok(()),
        }
    }
}

fn rows<const D: usize>(x: Tensor<D>, d_in: usize) -> Tensor<2> {
    assert_eq!(x.dims()[D - 1], d_in, "the inputs of the Gram");
    let n = x.dims()[..D - 1].iter().product::<usize>();
    x.reshape([n, d_in])
}
