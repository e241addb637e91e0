//! The settings of the papers: base, adapter and training, each with its source.
//!
//! Settings without a source are marked as ours. Steps, batches and texts are the user's.
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use peft::{Linear, Method, Weight, presets};
//! use quant_core::Quantizer;
//!
//! let preset = presets::qlora();
//! let weight = Tensor::random([128, 128], Distribution::Normal(0.0, 0.1), &Device::flex());
//! let packed = preset.quantizer.quantize(weight, None)?.weight;
//! let adapter = preset.method.init("proj", &Linear::new(Weight::Quant(packed), None))?;
//! assert_eq!(adapter.method(), "LoRA");
//! assert_eq!(preset.fit.learning_rate(), 2e-4);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use quant_core::{DoubleQuant, GroupRange, NormalFloat, Optq, Order, Rtn};

use crate::{FitConfig, Lora, Peqa, Pooling, Schedule, Tile};

/// The quantizer, the method and the training of a paper.
#[derive(Clone, Debug)]
pub struct Preset<Q, M> {
    /// The quantizer of the base.
    pub quantizer: Q,
    /// The method that is attached.
    pub method: M,
    /// The training: rates, clipping and decay, for one epoch.
    pub fit: FitConfig,
}

/// QLoRA (Dettmers et al. 2023, arXiv:2305.14314, and its published code).
///
/// | setting | value | source |
/// |---|---|---|
/// | base | NF4, blocks of 64, double quantization in blocks of 256, all layers but the head | paper |
/// | `r`, `α` | 64, 16 | `qlora.py` |
/// | dropout | 0 | `qlora.py`; the scripts of Guanaco have 0.1 at 7 B, 0.05 above |
/// | learning rate | 2e-4, constant | `qlora.py`; 1e-4 from 33 B on in the scripts |
/// | gradient norm | clipped at 0.3 | `qlora.py` |
/// | AdamW | `β₂` 0.999, no decay | `qlora.py` |
///
/// The scripts warm up for 3 % of the steps, which is the user's to set. Paged optimizer states are a
/// way to allocate them on CUDA, and change no result.
pub fn qlora() -> Preset<NormalFloat, Lora> {
    Preset {
        quantizer: NormalFloat::new()
            .with_block_size(64)
            .with_double_quant(DoubleQuant::dynamic()),
        method: Lora::new(64).with_alpha(16.0),
        fit: as_qlora(2e-4),
    }
}

/// QA-LoRA (Xu et al. 2023, arXiv:2309.14717, and its published code).
///
/// | setting | value | source |
/// |---|---|---|
/// | base | OPTQ, 4 bits, asymmetric, groups of 32, no act-order | paper |
/// | `r`, `α` | 64, 16 | code |
/// | pooling | sum | paper; its code has the mean ([`Pooling::Mean`]), whose gradients are 32 times smaller |
/// | initialization | `A` by Xavier's rule, `B` zero | code |
/// | learning rate | 2e-5, constant; 1e-5 from 33 B on | paper |
/// | gradient norm, AdamW | as QLoRA | code |
///
/// With the mean, qpeft's benchmarks report that rates of 1e-3 to 2e-3 are needed. A layer needs 64
/// groups for this rank, that is 2048 inputs.
pub fn qa_lora() -> Preset<Optq, Tile> {
    Preset {
        quantizer: Optq::new()
            .with_bits(4)
            .with_group_size(32)
            .with_order(Order::Natural),
        method: Tile::qa_lora(64)
            .with_alpha(16.0)
            .with_pooling(Pooling::Sum),
        fit: as_qlora(2e-5),
    }
}

/// Q-BaRA, published as Q-BLoRA (its code: `layer.py`, `bnb.py`, and its run script).
///
/// | setting | value | source |
/// |---|---|---|
/// | base | NF4 with double quantization, as QLoRA | code |
/// | tiles | means of 2 inputs, outputs given to 2, rank `2 r` | code |
/// | `r`, `α` | 64, 16; `σ = α / r` with the `r` before it is doubled | code |
/// | learning rate, clipping, AdamW | as QLoRA | run script |
pub fn q_bara() -> Preset<NormalFloat, Tile> {
    Preset {
        method: Tile::q_bara(64).with_alpha(16.0),
        quantizer: qlora().quantizer,
        fit: as_qlora(2e-4),
    }
}

/// QA-HiRA, whose published code has one matrix over tiles of 4 inputs and 8 outputs, no quantized
/// base and no merge.
///
/// | setting | value | source |
/// |---|---|---|
/// | parameters | one for 32 weights | code |
/// | tiles | groups of 32 inputs × 1 output, which merge into groups | ours |
/// | base | as QA-LoRA | ours |
/// | pooling, `σ` | sum, 1 | ours: the code's mean and 16 / 64 make steps 128 times smaller |
/// | initialization | zero | ours: it changes no output |
/// | learning rate, clipping, AdamW | as QLoRA | run script |
pub fn qa_hira() -> Preset<Optq, Tile> {
    Preset {
        method: Tile::qa_hira(),
        quantizer: qa_lora().quantizer,
        fit: as_qlora(2e-4),
    }
}

/// PEQA (Kim et al. 2023, arXiv:2305.14152).
///
/// | setting | value | source |
/// |---|---|---|
/// | base | rounded to nearest, 4 bits, asymmetric, per channel | paper |
/// | range | searched for the least error, as in OPTQ's code | ours; the paper is said to minimize squares |
/// | trained | scales | paper; as logarithms of factors: ours |
/// | learning rate | 2e-3, linear to zero | ours: relative to a scale, as 2e-5 is to one of 0.01, the rate of EfficientQAT's second phase (Chen et al. 2024, arXiv:2407.11062) |
pub fn peqa() -> Preset<Rtn, Peqa> {
    Preset {
        quantizer: Rtn::new().with_bits(4).with_range(GroupRange::Clipped),
        method: Peqa::new(),
        fit: FitConfig::new()
            .with_learning_rate(2e-3)
            .with_schedule(Schedule::Linear),
    }
}

/// The training of `qlora.py`.
fn as_qlora(learning_rate: f64) -> FitConfig {
    FitConfig::new()
        .with_learning_rate(learning_rate)
        .with_schedule(Schedule::Constant)
        .with_beta_2(0.999)
        .with_max_grad_norm(Some(0.3))
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor, TensorData};
    use quant_core::{Gram, Quantizer};

    use super::*;
    use crate::{Linear, Method, Weight};

    /// Each of them quantizes a layer, attaches, and has settings that can be trained with.
    #[test]
    fn presets_can_be_used() {
        let device = Device::flex();
        let n = 2048;
        let values = (0..n * n).map(|at| ((at * 7919 % 10007) as f32 - 5003.0) / 5003.0);
        let weight = TensorData::new(values.collect::<Vec<_>>(), [n, n]);
        let weight = Tensor::<2>::from_data(weight, &device);
        let mut gram = Gram::new(n, &device);
        gram.update(weight.clone().slice([0..64, 0..n]));
        let check = |quantizer: &dyn Quantizer, method: &dyn Method, fit: &FitConfig| {
            let packed = quantizer.quantize(weight.clone(), Some(&gram)).unwrap();
            fit.check().unwrap();
            let linear = Linear::new(Weight::Quant(packed.weight), None);
            let adapter = method.init("proj", &linear).unwrap();
            let n_trainable = burn::module::Module::num_params(&adapter);
            (adapter.method(), n_trainable)
        };
        let preset = qlora();
        let found = check(&preset.quantizer, &preset.method, &preset.fit);
        assert_eq!(found, ("LoRA", 64 * 4096));
        let preset = qa_lora();
        let found = check(&preset.quantizer, &preset.method, &preset.fit);
        assert_eq!(found, ("QA-LoRA", 64 * (64 + 2048)));
        let preset = q_bara();
        let found = check(&preset.quantizer, &preset.method, &preset.fit);
        assert_eq!(found, ("Q-BaRA", 64 * 4096));
        let preset = qa_hira();
        let found = check(&preset.quantizer, &preset.method, &preset.fit);
        assert_eq!(found, ("QA-HiRA", 64 * 2048));
        let preset = peqa();
        let found = check(&preset.quantizer, &preset.method, &preset.fit);
        assert_eq!(found, ("PEQA", 2048));
    }
}
