//! Noise on the embedded tokens of a training (NEFTune, Jain et al. 2023, arXiv:2310.05914).

use burn::tensor::{Tensor, TensorData};
use rand::RngExt;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

/// Noise of a batch: a function of the seed and of the shape, so that an embedding that is made again gets
/// the same.
#[derive(Clone, Copy)]
pub(super) struct Noise {
    pub(super) alpha: f64,
    pub(super) seed: u64,
}

impl Noise {
    /// `x`, `[batch, seq, hidden]`, with uniform noise up to `alpha / sqrt(seq * hidden)`.
    pub(super) fn add(self, x: Tensor<3>) -> Tensor<3> {
        let dims @ [n, seq, hidden] = x.dims();
        let bound = (self.alpha / ((seq * hidden) as f64).sqrt()) as f32;
        if bound <= 0.0 {
            return x;
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let noise = (0..n * seq * hidden).map(|_| rng.random_range(-bound..bound));
        let noise = TensorData::new(noise.collect::<Vec<f32>>(), dims);
        let place = (&x.device(), x.dtype());
        x + Tensor::from_data(noise, place)
    }
}
