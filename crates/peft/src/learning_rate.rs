//! Default learning rates of AdamW, by what is trained and by the hidden size of the model.
//!
//! A step of AdamW changes each parameter by about the learning rate, whatever the size of its gradient.
//! How much it changes an output of a layer depends on what the parameter multiplies:
//!
//! * The *factors* of a product of low rank, and the *elements* of a matrix, are summed over the inputs
//!   of the layer. The signs of the changes follow those of the inputs, so that the terms of the sum do not
//!   cancel, and there are as many as the layer has inputs: the rate falls as one over the width. For
//!   LoRA's `A` this is the Θ(1 / n) of Hayou et al. 2024, arXiv:2402.12354, for the elements of a matrix
//!   that of Yang et al. 2022, arXiv:2203.03466.
//! * *Pooled factors* multiply sums of inputs, and so do the elements of a pooled matrix. Where the inputs
//!   of a group have one sign, their sum is as many times larger as there are: the rates are a quarter of
//!   those of plain factors, with which a model whose inputs are so gains too. The changes of all ranks
//!   add up to `r` times `σ`, which is `α`: the rate falls as 1 / `α` above 4.
//! * *Scales* are multiplied by `exp(φ)`: a change of `φ` is relative to the weights, at any width.
//! * The *vectors* of VeRA scale outputs of a product, one factor each, so that their rate does not depend
//!   on the width.
//!
//! The rates at width 128 are those of the two embedded models of the examples; narrower models have the
//! same. The table compares the
//! rates of wider models with published ones:
//!
//! | trained | width 128 | width 4096 | published for width 4096 |
//! |---|---:|---:|---|
//! | factors | 5e-3 | 1.6e-4 | QLoRA 2e-4, and 1e-4 at width 6656, where it is 1.0e-4 here (Dettmers et al. 2023, arXiv:2305.14314) |
//! | pooled factors, `α` 16 | 3.1e-4 | 9.8e-6 | QA-LoRA 2e-5 (Xu et al. 2023, arXiv:2309.14717) |
//! | elements | 5e-4 | 1.6e-5 | none with tiles of this size |
//! | scales | 2e-3 | 2e-3 | 2e-5 for a scale of about 0.01 (Chen et al. 2024, arXiv:2407.11062) |
//! | vectors | 2e-2 | 2e-2 | 4e-3 (Kopiczko et al. 2024, arXiv:2310.11454), for many more steps |
//!
//! `docs/results.md` has losses of a model of width 576 at these rates and at others.

/// The width of the models that the rates were chosen with.
const WIDTH: f64 = 128.0;

/// The factor of the rates that fall with the width.
fn of_width(hidden_size: usize) -> f64 {
    WIDTH / (hidden_size as f64).max(WIDTH)
}

/// The rate of the factors of a product of low rank.
pub(crate) fn of_factors(hidden_size: usize) -> f64 {
    5e-3 * of_width(hidden_size)
}

/// The rate of the factors of a product of low rank with inputs that are summed over pools.
pub(crate) fn of_pooled_factors(hidden_size: usize, alpha: f32) -> f64 {
    0.25 * of_factors(hidden_size) * 4.0 / f64::from(alpha.max(4.0))
}

/// The rate of the elements of a matrix that is added to the weight.
pub(crate) fn of_elements(hidden_size: usize) -> f64 {
    5e-4 * of_width(hidden_size)
}

/// The rate of the logarithms of scales.
pub(crate) fn of_scales() -> f64 {
    2e-3
}

/// The rate of the vectors of VeRA.
pub(crate) fn of_vectors() -> f64 {
    2e-2
}

#[cfg(test)]
mod tests {
    use crate::{Bayesian, Lora, Method, Peqa, Tile, Vera};

    #[test]
    fn rates_of_low_ranks_and_tiles_fall_with_the_width() {
        let of_factors: [&dyn Method; 4] = [
            &Lora::new(4),
            &Lora::new(4).with_dora(true),
            &Bayesian::new(4),
            &Tile::q_bara(4),
        ];
        for method in of_factors {
            for narrow in [0, 1, 64, 128] {
                assert_eq!(method.learning_rate(narrow), 5e-3);
            }
            assert_eq!(method.learning_rate(512), 1.25e-3);
            assert_eq!(method.learning_rate(4096), 1.5625e-4);
        }
        assert_eq!(Lora::new(16).learning_rate(4096), 1.5625e-4);
        for pooled in [Tile::qa_lora(2), Tile::qa_lora(4), Tile::qa_blora(4)] {
            assert_eq!(pooled.learning_rate(64), 1.25e-3);
            assert_eq!(pooled.learning_rate(128), 1.25e-3);
            assert_eq!(pooled.learning_rate(512), 3.125e-4);
        }
        let published = Tile::qa_lora(64).with_alpha(16.0);
        for of_16 in [Tile::qa_lora(16), published] {
            assert_eq!(of_16.learning_rate(4096), 9.765625e-6);
        }
        assert_eq!(Tile::qa_hira().learning_rate(64), 5e-4);
        assert_eq!(Tile::qa_hira().learning_rate(128), 5e-4);
        assert_eq!(Tile::qa_hira().learning_rate(4096), 1.5625e-5);
    }

    #[test]
    fn rates_of_scales_and_vectors_do_not_depend_on_the_width() {
        for hidden_size in [128, 4096] {
            assert_eq!(Peqa::new().learning_rate(hidden_size), 2e-3);
            assert_eq!(
                Peqa::new().with_zeros(true).learning_rate(hidden_size),
                2e-3
            );
            assert_eq!(Vera::new(256).learning_rate(hidden_size), 2e-2);
        }
    }
}
