use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use peft::{Linear, Weight};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rand_distr::{Distribution, Normal};

/// Where a model's parameters come from, under their names in Hugging Face's files.
pub(crate) trait Source {
    type Error;

    /// A vector of `len`.
    fn vector(&mut self, name: &str, len: usize) -> Result<Param<Tensor<1>>, Self::Error>;

    /// A table of `rows` by `columns`, as it lies in the file.
    fn table(&mut self, name: &str, dims: [usize; 2]) -> Result<Param<Tensor<2>>, Self::Error>;

    /// The weight `[d_in, d_out]` of the projection at `path`, dense or packed.
    fn weight(&mut self, path: &str, dims: [usize; 2]) -> Result<Weight, Self::Error>;

    /// The weight `[d_in, vocab]` of the head, which is at [`HEAD`].
    fn head(&mut self, dims: [usize; 2]) -> Result<Weight, Self::Error>;
}

/// The path of the head.
pub(crate) const HEAD: &str = "lm_head";

/// The projection at `path`.
pub(crate) fn linear<S: Source>(
    path: &str,
    dims: [usize; 2],
    has_bias: bool,
    source: &mut S,
) -> Result<Linear, S::Error> {
    let weight = source.weight(path, dims)?;
    let bias = match has_bias {
        true => Some(source.vector(&format!("{path}.bias"), dims[1])?),
        false => None,
    };
    Ok(Linear::new(weight, bias))
}

/// Fresh parameters: norms of one, biases of zero, and normal weights of deviation 0.02.
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

    fn vector(&mut self, name: &str, len: usize) -> Result<Param<Tensor<1>>, Self::Error> {
        let value = if name.ends_with(".bias") { 0.0 } else { 1.0 };
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
