//! Block-AP beside other ways to pack the embedded model at 2 bits.
#![cfg(feature = "flex")]

use burn::tensor::Device;
use evaluate::perplexity;
use examples::corpus::{Dialect, text};
use examples::embedded::{self, Architecture};
use loftq::{ApiqBlock, BlockAp};
use models::Model;
use quant_core::{Optq, Quantizer, Rtn};

/// On held-out text, without an adapter, below OPTQ and below ApiQ with its adapters.
#[test]
fn block_ap_is_nearest_to_the_dense_model_at_2_bits() {
    let dir = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let model = embedded::write(dir.path(), Architecture::Llama).unwrap();
    let lm = models::load(model, &device).unwrap();
    let windows = |length, seed, size| {
        let text = text(Dialect::Plain, length, seed);
        lm.windows(&text, 128).unwrap().batches(size, &device)
    };
    let (calibration, held_out) = (windows(30_000, 20, 2), windows(12_000, 12, 8));
    let value = |model: &Model| perplexity(model, &held_out).unwrap().value();
    let quantized = |quantizer: &dyn Quantizer| {
        let mut model = lm.model.clone();
        models::quantize(&mut model, &quantizer, &calibration, |_| {}).unwrap();
        value(&model)
    };
    let initialized = |method: &dyn loftq::Initialization<Model>, rtn: &Rtn| {
        let mut model = lm.model.clone();
        loftq::init(&mut model, method, rtn, &calibration, |_| {}).unwrap();
        value(&model)
    };
    let dense = value(&lm.model);
    for group_size in [32, 64] {
        let rtn = Rtn::new().with_bits(2).with_group_size(group_size);
        let optq = Optq::new().with_bits(2).with_group_size(group_size);
        let (rounded, optq) = (quantized(&rtn), quantized(&optq));
        let apiq = ApiqBlock::new(8).with_learning_rates(1e-2, 5e-3);
        let apiq = initialized(&apiq.with_rounds(4), &rtn);
        let block_ap = BlockAp::new().with_learning_rates(5e-4, 6e-4);
        let trained = initialized(&block_ap.with_rounds(4), &rtn);
        let all = format!("{dense} dense, {rounded} RTN, {optq} OPTQ, {apiq} ApiQ, {trained}");
        assert!(optq < rounded && apiq < optq, "{group_size}: {all}");
        // Less than two thirds of the rise that ApiQ leaves.
        assert!(
            trained - dense < (apiq - dense) / 1.5,
            "{group_size}: {all}"
        );
    }
}
