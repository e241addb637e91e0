//! LoRA: a product of two thin matrices is added to the weight; over a packed weight it is QLoRA.
//!
//! Hu et al. 2021, arXiv:2106.09685, and Dettmers et al. 2023, arXiv:2305.14314:
//! `y = x W + σ (x A) B` with `σ = α / r` and `W` frozen. `A` begins uniform in `±1 / √d_in`, as in
//! PEFT (Kaiming with `a = √5`), and `B` at zero.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::RngExt;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use sha2::{Digest, Sha256};

use super::{Adapter, Method, check_shape, read_param, stored};
use crate::files::{LazyTensor, TensorFile};
use crate::linear::dense_matmul;
use crate::{Error, Exactness, Result, Targets, Weight};

/// Trains a matrix of low rank beside each layer's weight, dense or packed.
///
/// It merges into a dense weight within a bound that the certificate states. The sum with a packed
/// weight has no codes: that merge is refused, and the adapters stay beside the base.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    rank: usize,
    alpha: f32,
    targets: Targets,
    seed: u64,
}

impl Lora {
    /// Of this rank `r` on every linear layer, with `α = r`, that is `σ = 1`.
    pub fn new(rank: usize) -> Self {
        Self {
            rank,
            alpha: rank as f32,
            targets: Targets::All,
            seed: 0,
        }
    }

    /// With this `α`: the product is multiplied by `σ = α / r`.
    pub fn with_alpha(mut self, alpha: f32) -> Self {
        self.alpha = alpha;
        self
    }

    /// On these layers only.
    pub fn with_targets(mut self, targets: impl Into<Targets>) -> Self {
        self.targets = targets.into();
        self
    }

    /// With `A` drawn from this seed, and from the path of the layer.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    fn check(&self) -> Result<()> {
        let refuse = |setting, value: String, expected| {
            Err(Error::Setting {
                setting,
                value,
                expected,
            })
        };
        if self.rank == 0 {
            return refuse("rank", "0".into(), "at least 1");
        }
        if !is_positive(self.alpha) {
            return refuse("alpha", self.alpha.to_string(), "a positive number");
        }
        Ok(())
    }
}

fn is_positive(alpha: f32) -> bool {
    alpha.is_finite() && alpha > 0.0
}

impl Method for Lora {
    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn init(&self, path: &str, weight: &Weight) -> Result<Adapter> {
        self.check()?;
        check_dtype(path, weight)?;
        let (rank, [d_in, d_out]) = (self.rank, weight.dims());
        if rank > d_in.min(d_out) {
            return Err(Error::Rank {
                path: path.into(),
                rank,
                dims: [d_in, d_out],
            });
        }
        // A layer's numbers do not depend on which others are adapted.
        let seed = Sha256::digest(format!("{} {path}", self.seed));
        let mut rng = ChaCha8Rng::from_seed(seed.into());
        let bound = 1.0 / (d_in as f32).sqrt();
        let a: Vec<f32> = (0..d_in * rank)
            .map(|_| rng.random_range(-bound..bound))
            .collect();
        let device = weight.device();
        let a = Tensor::from_data(TensorData::new(a, [d_in, rank]), (&device, DType::F32));
        let b = Tensor::zeros([rank, d_out], (&device, DType::F32));
        Ok(Adapter::Lora(LoraAdapter {
            a: Param::from_tensor(a),
            b: Param::from_tensor(b),
            alpha: self.alpha,
        }))
    }
}

/// The factors of what is added to one layer's weight.
#[derive(Module, Debug)]
pub struct LoraAdapter {
    a: Param<Tensor<2>>,
    b: Param<Tensor<2>>,
    alpha: f32,
}

impl LoraAdapter {
    pub(super) const NAME: &'static str = "lora";

    /// The factor on the side of the inputs, `[d_in, r]`.
    pub fn a(&self) -> Tensor<2> {
        self.a.val()
    }

    /// The factor on the side of the outputs, `[r, d_out]`.
    pub fn b(&self) -> Tensor<2> {
        self.b.val()
    }

    /// `α`.
    pub fn alpha(&self) -> f32 {
        self.alpha
    }

    /// `r`.
    pub fn rank(&self) -> usize {
        self.a().dims()[1]
    }

    /// `σ = α / r`.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank() as f32
    }

    pub(super) fn forward<const D: usize>(&self, weight: &Weight, x: Tensor<D>) -> Tensor<D> {
        // Of all factors, `x A` has the fewest numbers to scale, unless rows are many.
        let low = dense_matmul(x.clone(), self.a()) * self.scale();
        weight.matmul(x) + dense_matmul(low, self.b())
    }

    pub(super) fn check(&self, path: &str, weight: &Weight) -> Result<()> {
        check_dtype(path, weight)?;
        let (rank, [d_in, d_out]) = (self.rank(), weight.dims());
        check_shape(path, [d_in, rank], self.a().dims())?;
        check_shape(path, [rank, d_out], self.b().dims())
    }

    pub(super) fn merge(&self, path: &str, weight: &Weight) -> Result<(Weight, Exactness)> {
        self.check(path, weight)?;
        let weight = match weight {
            Weight::Dense(weight) => weight,
            Weight::Quant(_) => {
                return Err(Error::MergeIntoPacked {
                    method: "LoRA",
                    path: path.into(),
                });
            }
        };
        let update = (self.a() * self.scale()).matmul(self.b());
        let merged = (weight.val() + update).detach();
        let values = merged.to_data().convert::<f32>();
        let values = values.as_slice::<f32>().expect("converted to f32");
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let d_out = self.b().dims()[1];
            return Err(Error::Quant {
                path: path.into(),
                source: quant_core::Error::NonFinite {
                    what: "the merged weight",
                    value: values[at],
                    row: at / d_out,
                    column: at % d_out,
                    count: values.iter().filter(|value| !value.is_finite()).count(),
                },
            });
        }
        let merged = Param::from_tensor(merged).set_require_grad(weight.is_require_grad());
        // Both the adapted and the merged layer round each product at most as often as it is a term
        // of a sum over inputs and over ranks, and for the scale and the addition.
        let roundings = 2 * (merged.val().dims()[0] + self.rank() + 2);
        Ok((Weight::Dense(merged), Exactness::Bounded { roundings }))
    }

    pub(super) fn tensors(&self) -> Vec<(&'static str, LazyTensor<'_>)> {
        let alpha = LazyTensor::floats([1], || vec![self.alpha]);
        vec![
            ("a", stored(&self.a)),
            ("b", stored(&self.b)),
            ("alpha", alpha),
        ]
    }

    pub(super) fn read(path: &str, file: &mut TensorFile, device: &Device) -> Result<Self> {
        let name = |tensor: &str| format!("{path}.{tensor}");
        let a = read_param(&name("a"), file, device)?;
        let b = read_param(&name("b"), file, device)?;
        let (rank, b_rank) = (a.val().dims()[1], b.val().dims()[0]);
        if rank == 0 || rank != b_rank {
            let problem = format!("has {b_rank} rows where `{}` has {rank} columns", name("a"));
            return Err(file.refuse(&name("b"), problem));
        }
        let (alpha, _) = file.floats::<1>(&name("alpha"))?;
        match alpha[..] {
            [alpha] if is_positive(alpha) => Ok(Self { a, b, alpha }),
            _ => Err(file.refuse(
                &name("alpha"),
                format!("is {alpha:?}, not one positive number"),
            )),
        }
    }
}

/// Checks that a dense weight is of the dtype in which adapters are trained.
fn check_dtype(path: &str, weight: &Weight) -> Result<()> {
    match weight {
        Weight::Dense(weight) if weight.val().dtype() != DType::F32 => Err(Error::NotF32 {
            path: path.into(),
            found: weight.val().dtype(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use quant_core::{Quantizer, Rtn};

    use super::*;
    use crate::Linear;

    /// A matrix in f64, row by row.
    #[derive(Clone)]
    struct Matrix {
        dims: [usize; 2],
        values: Vec<f64>,
    }

    impl Matrix {
        fn new(dims: [usize; 2], at: impl Fn(usize, usize) -> f64) -> Self {
            let values = (0..dims[0] * dims[1]).map(|n| at(n / dims[1], n % dims[1]));
            let values = values.collect();
            Self { dims, values }
        }

        fn of(tensor: Tensor<2>) -> Self {
            let dims = tensor.dims();
            let values = tensor.into_data().try_into_vec::<f32>().unwrap();
            Self::new(dims, |i, j| f64::from(values[i * dims[1] + j]))
        }

        fn at(&self, i: usize, j: usize) -> f64 {
            self.values[i * self.dims[1] + j]
        }

        fn t(&self) -> Self {
            Self::new([self.dims[1], self.dims[0]], |i, j| self.at(j, i))
        }

        fn times(&self, other: &Self) -> Self {
            assert_eq!(self.dims[1], other.dims[0]);
            Self::new([self.dims[0], other.dims[1]], |i, j| {
                (0..self.dims[1])
                    .map(|k| self.at(i, k) * other.at(k, j))
                    .sum()
            })
        }

        fn plus(&self, factor: f64, other: &Self) -> Self {
            assert_eq!(self.dims, other.dims);
            Self::new(self.dims, |i, j| self.at(i, j) + factor * other.at(i, j))
        }

        fn abs(&self) -> Self {
            Self::new(self.dims, |i, j| self.at(i, j).abs())
        }

        /// Whether `found` is no further from this than `roundings` may take it, in sums of terms
        /// whose magnitudes add up to `magnitudes`.
        fn is_near(&self, found: &Self, roundings: usize, magnitudes: &Self) -> bool {
            let bound = Exactness::Bounded { roundings }.bound();
            assert_eq!(self.dims, found.dims);
            assert_eq!(self.dims, magnitudes.dims);
            (self.values.iter().zip(&found.values))
                .zip(&magnitudes.values)
                .all(|((value, found), magnitude)| (value - found).abs() <= bound * magnitude)
        }
    }

    #[derive(Debug)]
    struct Case {
        weight: Tensor<2>,
        adapter: LoraAdapter,
        x: Tensor<2>,
        /// The gradient of the output.
        dy: Tensor<2>,
    }

    fn cases() -> impl Strategy<Value = Case> {
        let alpha = prop::sample::select(vec![0.3f32, 1.0, 32.0]);
        let dims = (1..40usize, 1..40usize, 1..9usize);
        (dims, 1..=8usize, alpha, any::<u64>()).prop_map(
            |((d_in, d_out, rows), rank, alpha, seed)| {
                let rank = rank.min(d_in).min(d_out);
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                let mut random = |dims: [usize; 2]| {
                    let n = dims[0] * dims[1];
                    let values: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
                    Tensor::<2>::from_data(TensorData::new(values, dims), &Device::flex())
                };
                Case {
                    weight: random([d_in, d_out]),
                    adapter: LoraAdapter {
                        a: Param::from_tensor(random([d_in, rank])),
                        b: Param::from_tensor(random([rank, d_out])),
                        alpha,
                    },
                    x: random([rows, d_in]),
                    dy: random([rows, d_out]),
                }
            },
        )
    }

    fn refused(lora: &Lora, dims: [usize; 2]) -> Error {
        let weight = Weight::frozen(Tensor::zeros(dims, &Device::flex()));
        lora.init("mlp.up", &weight).unwrap_err()
    }

    proptest! {
        /// Outputs, adapted and merged, and the merged weight against sums in f64.
        #[test]
        fn outputs_are_those_of_the_sum(case in cases()) {
            let Case { weight, adapter, x, .. } = case;
            let (d_in, rank) = (weight.dims()[0], adapter.rank());
            let scale = f64::from(adapter.alpha() / rank as f32);
            let [w, a, b, rows] = [weight.clone(), adapter.a(), adapter.b(), x.clone()].map(Matrix::of);
            let sum = w.plus(scale, &a.times(&b));
            let magnitudes = w.abs().plus(scale, &a.abs().times(&b.abs()));
            let y = rows.times(&sum);
            let y_magnitudes = rows.abs().times(&magnitudes);

            let base = Weight::frozen(weight);
            let adapted = Matrix::of(adapter.forward(&base, x.clone()));
            prop_assert!(y.is_near(&adapted, d_in + rank + 2, &y_magnitudes));
            let (merged, exactness) = adapter.merge("mlp.up", &base).unwrap();
            let roundings = 2 * (d_in + rank + 2);
            prop_assert_eq!(exactness, Exactness::Bounded { roundings });
            let Weight::Dense(found) = &merged else { panic!("a dense weight was packed") };
            prop_assert!(!found.is_require_grad());
            prop_assert!(sum.is_near(&Matrix::of(found.val()), rank + 2, &magnitudes));
            let found = Matrix::of(Linear::new(merged, None).forward(x));
            prop_assert!(y.is_near(&found, d_in + rank + 2, &y_magnitudes));
            prop_assert!(adapted.is_near(&found, roundings, &y_magnitudes));
        }

        /// Gradients against sums in f64.
        #[test]
        fn gradients_are_those_of_the_sum(case in cases()) {
            let Case { weight, adapter, x, dy } = case;
            let (rank, [rows, d_in]) = (adapter.rank(), x.dims());
            let (d_out, scale) = (weight.dims()[1], f64::from(adapter.scale()));
            let x = x.autodiff().require_grad();
            let base = Weight::frozen(weight.clone());
            let tracked = adapter.clone().train();
            let loss = (tracked.forward(&base, x.clone()) * dy.clone().autodiff()).sum();
            let gradients = loss.backward();
            let found = [
                tracked.a().grad(&gradients),
                tracked.b().grad(&gradients),
                x.grad(&gradients),
            ];
            let found = found.map(|gradient| Matrix::of(gradient.unwrap()));

            let [w, a, b, x, dy] =
                [weight, adapter.a(), adapter.b(), x.inner(), dy].map(Matrix::of);
            let expected = |[w, a, b, x, dy]: [&Matrix; 5]| {
                let zero = |m: &Matrix| Matrix::new(m.dims, |_, _| 0.0);
                [
                    zero(a).plus(scale, &x.t().times(&dy.times(&b.t()))),
                    zero(b).plus(scale, &x.times(a).t().times(dy)),
                    dy.times(&w.t()).plus(scale, &dy.times(&b.t()).times(&a.t())),
                ]
            };
            let exact = expected([&w, &a, &b, &x, &dy]);
            let magnitudes = expected([&w.abs(), &a.abs(), &b.abs(), &x.abs(), &dy.abs()]);
            let roundings = [d_out + rows + 1, d_in + rows + 1, d_out + rank + 2];
            for (at, n) in roundings.into_iter().enumerate() {
                prop_assert!(exact[at].is_near(&found[at], n, &magnitudes[at]), "gradient {}", at);
            }
        }

        /// Over a packed weight: its product, and the same update as over a dense one.
        #[test]
        fn over_a_packed_weight_it_is_qlora(case in cases()) {
            let Case { weight, adapter, x, .. } = case;
            let zeros = Weight::frozen(weight.zeros_like());
            let rtn = Rtn::new().with_bits(3).with_group_size(weight.dims()[0].min(5));
            let packed = rtn.quantize(weight, None).unwrap();
            let packed = Weight::Quant(packed.weight);
            let expected = packed.matmul(x.clone()) + adapter.forward(&zeros, x.clone());
            let found = adapter.forward(&packed, x);
            let [found, expected] = [found, expected].map(|y| y.into_data().try_into_vec::<f32>().unwrap());
            prop_assert_eq!(found, expected);
            let error = adapter.merge("mlp.up", &packed).unwrap_err();
            let named = matches!(&error, Error::MergeIntoPacked { path, .. } if path == "mlp.up");
            prop_assert!(named);
        }
    }

    #[test]
    fn a_merge_that_overflows_is_refused() {
        let weight = Weight::frozen(Tensor::zeros([3, 2], &Device::flex()));
        let large =
            |shape: [usize; 2]| Param::from_tensor(Tensor::full(shape, 1e20, &Device::flex()));
        let adapter = LoraAdapter {
            a: large([3, 1]),
            b: large([1, 2]),
            alpha: 1.0,
        };
        let error = adapter.merge("mlp.up", &weight).unwrap_err();
        let named = matches!(
            &error,
            Error::Quant { path, source: quant_core::Error::NonFinite { count: 6, .. } } if path == "mlp.up"
        );
        assert!(named, "{error}");
    }

    #[test]
    fn fresh_factors_are_uniform_and_follow_seed_and_path() {
        let weight = Weight::frozen(Tensor::zeros([400, 300], &Device::flex()));
        let a = |lora: &Lora, path| {
            let Adapter::Lora(adapter) = lora.init(path, &weight).unwrap() else {
                panic!("another method");
            };
            assert_eq!(adapter.scale(), 2.0);
            assert_eq!(adapter.b().dims(), [50, 300]);
            assert!(Matrix::of(adapter.b()).values.iter().all(|&b| b == 0.0));
            Matrix::of(adapter.a()).values
        };
        let lora = Lora::new(50).with_alpha(100.0);
        let found = a(&lora, "mlp.up");
        assert_eq!(a(&lora, "mlp.up"), found);
        assert_ne!(a(&lora, "mlp.down"), found);
        assert_ne!(a(&lora.clone().with_seed(1), "mlp.up"), found);
        // The bound is 1/20, the variance a third of its square; within four standard deviations.
        let n = found.len() as f64;
        assert!(found.iter().all(|a| a.abs() <= 0.05 + 1e-9));
        let (sum, squares) = (found.iter()).fold((0.0, 0.0), |(s, q), a| (s + a, q + a * a));
        let variance = 0.05f64.powi(2) / 3.0;
        assert!((sum / n).abs() < 4.0 * (variance / n).sqrt());
        assert!((squares / n / variance - 1.0).abs() < 4.0 * (0.8 / n).sqrt());
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        let dims = [6, 4];
        for alpha in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let error = refused(&Lora::new(2).with_alpha(alpha), dims);
            let named = matches!(
                error,
                Error::Setting {
                    setting: "alpha",
                    ..
                }
            );
            assert!(named, "{error}");
        }
        let error = refused(&Lora::new(0).with_alpha(1.0), dims);
        let named = matches!(
            error,
            Error::Setting {
                setting: "rank",
                ..
            }
        );
        assert!(named, "{error}");
        for dims in [dims, [4, 6]] {
            let error = refused(&Lora::new(5), dims);
            let named = matches!(&error, Error::Rank { path, rank: 5, .. } if path == "mlp.up");
            assert!(named, "{error}");
        }
        let halves = Tensor::<2>::zeros(dims, (&Device::flex(), DType::BF16));
        let error = Lora::new(1).init("mlp.up", &Weight::frozen(halves));
        assert!(matches!(error, Err(Error::NotF32 { .. })));
    }
}
