//! A layer, its inputs, and quantizers.

use burn::tensor::{Device, Tensor, TensorData};
use loftq::{Layer, Truncation};
use quant_core::{Gram, NormalFloat, Optq, Quantizer, Rtn, sum_of_squares};
use rand::RngExt;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

pub(crate) const EXACT: Truncation = Truncation {
    tolerance: 1e-9,
    seed: 0,
};

pub(crate) fn random([m, n]: [usize; 2], seed: u64) -> Tensor<2> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values = (0..m * n).map(|_| rng.random_range(-1.0f32..1.0)).collect();
    Tensor::from_data(TensorData::new::<f32, _>(values, [m, n]), &Device::flex())
}

pub(crate) fn floats(matrix: Tensor<2>) -> Vec<f32> {
    matrix.into_data().try_into_vec().unwrap()
}

pub(crate) fn layer(weight: &Tensor<2>) -> Layer<'_> {
    Layer {
        path: "proj",
        weight: weight.clone(),
        gram: None,
        fisher: None,
    }
}

/// Correlated inputs, some of them loud.
pub(crate) fn inputs(d_in: usize, seed: u64) -> Tensor<2> {
    let loud: Vec<f32> = (0..d_in)
        .map(|i| if i % 7 == 3 { 6.0 } else { 1.0 })
        .collect();
    let loud = Tensor::<1>::from_floats(&loud[..], &Device::flex()).unsqueeze::<2>();
    let x = random([3 * d_in, d_in], seed);
    (x.clone() + x.matmul(random([d_in, d_in], seed + 1)) * 0.2) * loud
}

pub(crate) fn gram(x: &Tensor<2>) -> Gram {
    let mut gram = Gram::new(x.dims()[1], &x.device());
    gram.update(x.clone());
    gram
}

pub(crate) fn quantizers() -> Vec<Box<dyn Quantizer>> {
    vec![
        Box::new(Rtn::new().with_bits(2).with_group_size(16)),
        Box::new(
            Rtn::new()
                .with_bits(4)
                .with_group_size(24)
                .with_symmetric(true),
        ),
        Box::new(Rtn::new().with_bits(3)),
        Box::new(NormalFloat::new().with_block_size(32)),
        Box::new(NormalFloat::new().with_bits(2).with_block_size(16)),
        Box::new(Optq::new().with_bits(3).with_group_size(16)),
    ]
}

pub(crate) fn square_error(weight: &Tensor<2>, found: Tensor<2>) -> f64 {
    sum_of_squares(weight.clone() - found)
}
