use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::values::check_finite;
use crate::{Error, Result, linalg};

/// The Gram matrix of a layer's inputs, `G = Σ x xᵀ`, summed over tokens.
///
/// OPTQ's Hessian is `H = 2 G / n_tokens`. The factor cancels, except in the damping of inputs that
/// are always zero.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use quant_core::{Error, Gram};
///
/// let device = Device::flex();
/// let mut gram = Gram::new(2, &device);
/// gram.update(Tensor::<2>::from_data([[1.0, 2.0], [0.0, 1.0]], &device));
/// assert_eq!(gram.n_tokens(), 2);
/// let output = Tensor::<2>::from_data([[3.0], [-1.0]], &device);
/// assert_eq!(gram.energy(output), 1.0 + 1.0);
///
/// assert_eq!(gram.check(3), Err(Error::GramSize { d_in: 3, found: 2 }));
/// ```
#[derive(Clone, Debug)]
pub struct Gram {
    sum: Tensor<2>,
    drift: Option<Tensor<2>>,
    n_tokens: usize,
}

impl Gram {
    /// The Gram matrix of no tokens, for layers of `d_in` inputs.
    pub fn new(d_in: usize, device: &Device) -> Self {
        Self {
            sum: Tensor::zeros([d_in, d_in], device),
            drift: None,
            n_tokens: 0,
        }
    }

    /// Takes a sum over `n_tokens` tokens, `[d_in, d_in]`, symmetric.
    ///
    /// # Errors
    /// [`Error::GramSize`] if `sum` is not square.
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
    /// If the last dimension of `x` is not `d_in`, or earlier tokens came with a drift.
    pub fn update<const D: usize>(&mut self, x: Tensor<D>) {
        assert!(
            self.drift.is_none(),
            "tokens without a drift after tokens with one"
        );
        self.add(rows(x, self.d_in()));
    }

    fn add(&mut self, x: Tensor<2>) {
        self.n_tokens += x.dims()[0];
        // Given away, so that it is added to in its place.
        let empty = Tensor::empty([0, 0], &self.sum.device());
        self.sum = kernels::add_gram(std::mem::replace(&mut self.sum, empty), x);
    }

    /// Adds the inputs `x`, and their drift from the inputs of the dense model, `dense`.
    ///
    /// The drift is `Σ (dense - x) xᵀ`, which GPTAQ compensates (Li et al. 2025, arXiv:2504.02692).
    ///
    /// # Panics
    /// If the shapes of `x` and `dense` differ, their last dimension is not `d_in`, or earlier tokens
    /// came without a drift.
    pub fn update_with_drift<const D: usize>(&mut self, x: Tensor<D>, dense: Tensor<D>) {
        assert_eq!(x.dims(), dense.dims(), "the shapes of the inputs");
        assert!(
            self.drift.is_some() || self.n_tokens == 0,
            "tokens with a drift after tokens without one"
        );
        let (x, dense) = (rows(x, self.d_in()), rows(dense, self.d_in()));
        let drift = (dense - x.clone()).transpose().matmul(x.clone());
        self.drift = Some(match self.drift.take() {
            Some(sum) => sum + drift,
            None => drift,
        });
        self.add(x);
    }

    /// The number of inputs.
    pub fn d_in(&self) -> usize {
        self.sum.dims()[0]
    }

    /// The number of tokens so far.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// The sum `Σ x xᵀ`, `[d_in, d_in]`.
    pub fn sum(&self) -> Tensor<2> {
        self.sum.clone()
    }

    /// The drift `Σ (dense - x) xᵀ`, `[d_in, d_in]`, if it was summed.
    pub fn drift(&self) -> Option<Tensor<2>> {
        self.drift.clone()
    }

    /// The energy of a layer's output, `tr(Wᵀ G W) = Σ ‖x W‖²`, for a weight `[d_in, d_out]`.
    ///
    /// For the error of a quantized weight, this is the squared error of the layer's output.
    ///
    /// # Panics
    /// If `weight` has other than `d_in` rows.
    pub fn energy(&self, weight: Tensor<2>) -> f64 {
        let product = self.sum.clone().matmul(weight.clone()) * weight;
        // Column sums on the device, their total in f64.
        kernels::with_values(product.sum_dim(0), |columns| {
            columns.iter().map(|&sum| f64::from(sum)).sum()
        })
    }

    /// The sum of the diagonal, `Σ ‖x‖²`.
    pub fn trace(&self) -> f64 {
        self.diagonal().into_iter().map(f64::from).sum()
    }

    /// A square root of the damped matrix: the upper triangular `R` with `Rᵀ R = G + δ I`.
    ///
    /// So `‖R E‖² = Σ ‖x E‖² + δ ‖E‖²`. `δ` is the smallest of 10⁻⁶, 10⁻⁴ and 10⁻² times the mean of
    /// the diagonal for which a Cholesky factorization in `f64` succeeds. The root of a matrix of
    /// zeros is a multiple of the identity.
    ///
    /// # Errors
    /// Those of [`Gram::check`]; [`Error::NotPositive`] if no factorization succeeds.
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

    /// The sums of squares of the inputs, `[d_in]`.
    pub(crate) fn diagonal(&self) -> Vec<f32> {
        let d_in = self.d_in();
        kernels::with_values(self.sum(), |sum| {
            (0..d_in).map(|i| sum[i * d_in + i]).collect()
        })
    }

    /// Checks that this is the Gram matrix of a layer with `d_in` inputs.
    ///
    /// # Errors
    /// [`Error::GramSize`] for another number of inputs, [`Error::EmptyGram`] without tokens,
    /// [`Error::NonFinite`] with the first NaN or infinity, or [`Error::NegativeMoment`].
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
    // Sums of squares are computed in `f32`.
    x.reshape([n, d_in]).cast(DType::F32)
}
