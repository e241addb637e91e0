//! Gram matrices of inputs.

use burn::tensor::{Device, Tensor};
use quant_core::{Error, Gram};

use crate::cases::{scattered, tensor, values};

/// `Rᵀ R = G + δ I`, upper triangular; for few tokens, tokens of zeros, and no tokens.
#[test]
fn a_gram_has_a_root() {
    let device = Device::flex();
    for (n_tokens, d_in, damping) in [(40, 12, 1e-6), (5, 12, 1e-6), (700, 300, 1e-4)] {
        let mut gram = Gram::new(d_in, &device);
        gram.update(scattered([n_tokens, d_in]));
        let root = gram.root().unwrap();
        let product = root.clone().transpose().matmul(root.clone());
        let (found, sum) = (values(product), values(gram.sum()));
        let mean = sum.iter().step_by(d_in + 1).sum::<f32>() / d_in as f32;
        for (at, (found, sum)) in found.iter().zip(&sum).enumerate() {
            // The smallest damping that suffices, and the rounding of a product in f32.
            let on_diagonal = at % (d_in + 1) == 0;
            let damping = if on_diagonal { damping * mean } else { 0.0 };
            assert!(
                (found - sum - damping).abs() < 1e-5 * mean,
                "{found} for {sum}"
            );
        }
        let root = values(root);
        assert!((0..d_in * d_in).all(|at| at / d_in <= at % d_in || root[at] == 0.0));
    }
    let mut zeros = Gram::new(3, &device);
    zeros.update(Tensor::<2>::zeros([4, 3], &device));
    let root = values(zeros.root().unwrap());
    assert!(root[0] > 0.0 && root[0] == root[4] && root[1] == 0.0);
    assert_eq!(Gram::new(3, &device).root().unwrap_err(), Error::EmptyGram);
    let sum = Tensor::<2>::from_floats([[1.0, 3.0], [3.0, 1.0]], &device);
    let impossible = Gram::from_sum(sum, 2).unwrap();
    assert_eq!(impossible.root().unwrap_err(), Error::NotPositive);
}

#[test]
#[should_panic(expected = "the inputs of the Gram")]
fn inputs_of_another_layer_are_refused() {
    Gram::new(4, &Device::flex()).update(tensor(vec![1.0; 60], [10, 6]));
}
