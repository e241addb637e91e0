use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use peft::{Linear, Weight};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rand_distr::{Distribution, Normal};

/// A source of parameters under Hugging Face's names: a checkpoint, or random numbers.
pub(crate) trait Source {
    type Error;

    /// The vector of `len` elements that the module at `path` has.
    fn vector(
        &mut self,
        path: &str,
        kind: Vector,
        len: usize,
    ) -> Result<Param<Tensor<1>>, Self::Error>;

    /// The embedding table `[rows, columns]` at `path`.
    fn table(&mut self, path: &str, dims: [usize; 2]) -> Result<Param<Tensor<2>>, Self::Error>;

    /// The weight `[d_in, d_out]` of the layer at `path`, dense or packed.
    fn weight(&mut self, path: &str, dims: [usize; 2]) -> Result<Weight, Self::Error>;

    /// The weight `[d_in, vocab]` of the head, whose path is [`HEAD`].
    fn head(&mut self, dims: [usize; 2]) -> Result<Weight, Self::Error>;
}

/// The kinds of parameters with one dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vector {
    NormWeight,
    /// The weight of a norm, less one.
    NormOffset,
    Bias,
}

impl Vector {
    /// The name of the tensor of the module at `path`.
    pub(crate) fn name(self, path: &str) -> String {
        match self {
            Self::NormWeight | Self::NormOffset => weight_name(path),
            Self::Bias => format!("{path}.bias"),
        }
    }
}

/// The names and shapes of the tensors of a module in a file.
pub(crate) type Shapes = Vec<(String, Vec<usize>)>;

/// The name of the weight of the module at `path`.
pub(crate) fn weight_name(path: &str) -> String {
    format!("{path}.weight")
}

/// The path of the head.
pub(crate) const HEAD: &str = "lm_head";

/// Builds the projection at `path`.
pub(crate) fn linear<S: Source>(
    path: &str,
    dims: [usize; 2],
    has_bias: bool,
    source: &mut S,
) -> Result<Linear, S::Error> {
    let weight = source.weight(path, dims)?;
    let bias = if has_bias {
        Some(source.vector(path, Vector::Bias, dims[1])?)
    } else {
        None
    };
    Ok(Linear::new(weight, bias))
}

/// New parameters: norms of one, biases of zero, and normal weights of deviation 0.02.
pub(crate) struct Random {
    rng: ChaCha8Rng,
    device: Device,
}

impl Random {
    pub(crate) fn new(seed: u64, device: &Device) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            device: device.clone(),
        }
    }
}

impl Source for Random {
    type Error = std::convert::Infallible;

    fn vector(
        &mut self,
        _: &str,
        kind: Vector,
        len: usize,
    ) -> Result<Param<Tensor<1>>, Self::Error> {
        let value = match kind {
            Vector::NormWeight => 1.0,
            Vector::NormOffset | Vector::Bias => 0.0,
        };
        Ok(Param::from_tensor(Tensor::full([len], value, &self.device)))
    }

    fn table(&mut self, _: &str, dims: [usize; 2]) -> Result<Param<Tensor<2>>, Self::Error> {
        let normal = Normal::new(0.0f32, 0.02).expect("a deviation above zero");
        let values: Vec<f32> = (0..dims[0] * dims[1])
            .map(|_| normal.sample(&mut self.rng))
            .collect();
        let values = TensorData::new(values, dims);
        Ok(Param::from_tensor(Tensor::from_data(values, &self.device)))
    }

    fn weight(&mut self, path: &str, dims: [usize; 2]) -> Result<Weight, Self::Error> {
        self.table(path, dims).map(Weight::Dense)
    }

    fn head(&mut self, dims: [usize; 2]) -> Result<Weight, Self::Error> {
        self.weight(HEAD, dims)
    }
}
