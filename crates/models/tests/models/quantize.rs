//! Calibration stage by stage.

use std::collections::BTreeMap;

use burn::tensor::{Device, Distribution, Int, Tensor};
use models::{
    CheckpointFormat, Error, GptqVersion, LlamaConfig, Model, load, quantize, save_as,
    sensitivities,
};
use peft::{Batch, Fingerprint, Linears, PerLayer, Stages, State, Weight};
use quant_core::{Gram, GroupRange, NormalFloat, Note, Optq, Order, Quantizer, Rtn};

use super::fixtures::*;

/// A LLaMA with biases of the attention.
pub(crate) fn llama_config() -> LlamaConfig {
    llama()
        .with_vocab_size(48)
        .with_hidden_size(32)
        .with_intermediate_size(40)
        .with_max_position_embeddings(64)
        .with_attention_bias(true)
        .with_attention_output_bias(true)
}

pub(crate) fn model() -> Model {
    Model::init(llama_config(), 3, &Device::flex())
}

pub(crate) fn batches(n: usize) -> Vec<Batch> {
    let device = Device::flex();
    device.seed(5);
    let batch = |_| {
        let tokens = Tensor::<2>::random([4, 24], Distribution::Uniform(0.0, 48.0), &device);
        Batch::new(tokens.int()).unwrap()
    };
    (0..n).map(batch).collect()
}

fn weights(model: &Model) -> Vec<Vec<f32>> {
    let weight = |(_, linear): (String, &peft::Linear)| match linear.weight() {
        Weight::Dense(weight) => values(weight.val()),
        Weight::Quant(weight) => values(weight.dequantize()),
    };
    model.linears().into_iter().map(weight).collect()
}

/// An OPT of the style of OPT-125M, or of that of OPT-350M.
pub(crate) fn opt_model(before: bool) -> Model {
    let config = opt()
        .with_vocab_size(48)
        .with_hidden_size(32)
        .with_ffn_dim(40)
        .with_max_position_embeddings(64)
        .with_word_embed_proj_dim(if before { 32 } else { 24 })
        .with_do_layer_norm_before(before);
    Model::init(config, 3, &Device::flex())
}

/// Every projection of an OPT is packed, calibrated on what reaches it, and the packed model is saved
/// and loaded as it is.
#[test]
fn every_projection_of_an_opt_is_packed() {
    for before in [true, false] {
        let (mut model, batches) = (opt_model(before), batches(6));
        let optq = Optq::new().with_group_size(8);
        let layers = quantize(&mut model, &optq, &batches, |_| {}).unwrap();
        let names: Vec<&str> = layers.iter().map(|layer| layer.path.as_str()).collect();
        let expected: Vec<String> = (0..2)
            .flat_map(|layer| {
                let names = [
                    "self_attn.q_proj",
                    "self_attn.k_proj",
                    "self_attn.v_proj",
                    "self_attn.out_proj",
                    "fc1",
                    "fc2",
                ];
                names.map(|name| format!("model.decoder.layers.{layer}.{name}"))
            })
            .collect();
        assert_eq!(names, expected);
        assert!(layers.iter().all(|layer| layer.error.output.is_some()));
        let others = model.other_weights();
        assert!(others.iter().all(|(_, weight)| weight.format().is_none()));
        assert_eq!(others.len(), if before { 0 } else { 2 });
    }
}

/// A calibration that overflowed is refused, whatever the quantizer.
#[test]
fn a_gram_that_is_not_finite_is_refused() {
    let mut model = model();
    let mut gram = Gram::new(32, &Device::flex());
    gram.update(Tensor::<2>::full([2, 32], 1e30, &Device::flex()));
    let (path, linear) = model.linears_mut().remove(0);
    let error = linear
        .quantize(&path, &Rtn::new(), Some(&gram))
        .unwrap_err();
    assert!(error.to_string().contains("q_proj"), "{error}");
    let other = Gram::new(31, &Device::flex());
    assert!(linear.quantize(&path, &Rtn::new(), Some(&other)).is_err());
}

/// The Gram of each layer is that of its inputs in the model as it is packed by then.
#[test]
fn layers_are_calibrated_on_the_packed_ones_before_them() {
    let batches = batches(6);
    let optq = Optq::new().with_bits(3).with_group_size(8);
    let mut packed = model();
    let layers = quantize(&mut packed, &optq, &batches, |_| {}).unwrap();
    assert_eq!(layers.len(), 14);

    // The same by hand: the first three stages packed, the fourth calibrated on what they give.
    let mut partly = model();
    let first = partly.linears().into_iter().take(6);
    let first: BTreeMap<_, Box<dyn Quantizer>> = first
        .map(|(path, _)| (path, Box::new(optq) as Box<dyn Quantizer>))
        .collect();
    quantize(&mut partly, &PerLayer(first), &batches, |_| {}).unwrap();
    let mut gram = Gram::new(40, &Device::flex());
    for batch in &batches {
        let mut state = State::start(&partly, batch);
        for stage in 0..3 {
            state = partly.advance(stage, state);
        }
        gram.update(partly.input(3, &state));
    }
    assert_eq!(gram.n_tokens(), 6 * 4 * 24);
    let linears = partly.linears();
    let (path, linear) = &linears[6];
    assert_eq!(path, "model.layers.0.mlp.down_proj");
    let Weight::Dense(weight) = linear.weight() else {
        panic!("{path} is packed");
    };
    let expected = optq.quantize(weight.val(), Some(&gram)).unwrap().weight;
    assert!(weights(&packed)[6] == values(expected.dequantize()));
    assert!(weights(&packed)[..6] == weights(&partly)[..6]);
}

#[test]
fn calibration_pays() {
    let batches = batches(12);
    fn errors(quantizer: &impl Quantizer, batches: &[Batch]) -> Vec<f64> {
        let mut model = model();
        let mut seen = Vec::new();
        let layers = quantize(&mut model, quantizer, batches, |layer| {
            seen.push(layer.clone())
        });
        assert_eq!(layers.unwrap(), seen);
        seen.iter()
            .map(|layer| layer.error.output.unwrap())
            .collect()
    }
    let rtn = errors(&Rtn::new().with_bits(2), &batches);
    let optq = errors(&Optq::new().with_bits(2), &batches);
    assert_eq!(rtn.len(), 14);
    for (rtn, optq) in rtn.iter().zip(&optq) {
        assert!(optq < rtn, "{optq} and {rtn}");
    }
}

#[test]
fn weights_alone_need_no_calibration() {
    let nf4 = NormalFloat::new().with_block_size(8);
    let (mut with, mut without) = (model(), model());
    let layers = quantize(&mut with, &nf4, &batches(2), |_| {}).unwrap();
    assert!(layers[0].error.output.is_some_and(|error| error > 0.0));
    let layers = quantize(&mut without, &nf4, &[], |_| {}).unwrap();
    assert_eq!(layers[0].error.output, None);
    assert!(weights(&with) == weights(&without));

    let mut model = model();
    let error = quantize(&mut model, &Optq::new(), &[], |_| {}).unwrap_err();
    assert!(
        matches!(error, Error::Peft(peft::Error::NoCalibration)),
        "{error}"
    );
    assert!(sensitivities(&model, &[&nf4], &[], |_| {}).is_err());
    let error = sensitivities(&with, &[], &batches(1), |_| {}).unwrap_err();
    let quantized = matches!(error, Error::Peft(peft::Error::AlreadyQuantized { .. }));
    assert!(quantized, "{error}");
    let gptaq = Optq::new().with_drift(0.25);
    let measured = sensitivities(&model, &[&gptaq, &nf4], &batches(2), |_| {}).unwrap();
    assert_eq!((measured.len(), measured[0].1.len()), (14, 2));
    let mut recipe = PerLayer::default();
    recipe
        .0
        .insert("model.layers.0.q_proj".into(), Box::new(nf4));
    let error = quantize(&mut model, &recipe, &[], |_| {}).unwrap_err();
    assert!(
        matches!(error, Error::Peft(peft::Error::NoLayer { .. })),
        "{error}"
    );
    let tokens = Tensor::<2, Int>::full([1, 4], 48, &Device::flex());
    let wrong = [Batch::new(tokens).unwrap()];
    let error = quantize(&mut model, &Optq::new(), &wrong, |_| {}).unwrap_err();
    let token = matches!(error, Error::Peft(peft::Error::Token { token: 48, .. }));
    assert!(token, "{error}");
}

#[test]
fn notes_reach_the_report() {
    let tokens = Tensor::<2, Int>::ones([1, 4], &Device::flex());
    let few = [Batch::new(tokens).unwrap()];
    let layers = quantize(&mut model(), &Optq::new(), &few, |_| {}).unwrap();
    let note = Note::FewTokens {
        n_tokens: 4,
        d_in: 32,
    };
    assert!(layers[0].notes.contains(&note));
}

/// GPTAQ sees the dense stream: what its first stage gets has not drifted, what the others get has.
#[test]
fn drift_is_that_of_the_dense_model() {
    let batches = batches(8);
    let optq = Optq::new().with_bits(2).with_order(Order::Descending);
    let (mut plain, mut gptaq) = (model(), model());
    quantize(&mut plain, &optq, &batches, |_| {}).unwrap();
    quantize(&mut gptaq, &optq.with_drift(0.25), &batches, |_| {}).unwrap();
    let (plain, gptaq) = (weights(&plain), weights(&gptaq));
    assert!(plain[..3] == gptaq[..3]);
    assert!(plain[3..].iter().zip(&gptaq[3..]).all(|(a, b)| a != b));
}

#[test]
fn quantizing_refuses_before_it_changes_anything() {
    let (_dir, mut lm) = pretrained(llama(), 1);
    // The MLP's inner width is 20, the others are 24 and 32.
    let error =
        models::quantize(&mut lm.model, &Rtn::new().with_group_size(24), &[], |_| {}).unwrap_err();
    let Error::Peft(peft::Error::Quant { path, source }) = error else {
        panic!("{error}");
    };
    assert_eq!(path, "model.layers.0.mlp.down_proj");
    assert_says(source.to_string(), &["group size 24", "20 inputs"]);
    let dense = |(_, linear): (String, &peft::Linear)| matches!(linear.weight(), Weight::Dense(_));
    assert!(lm.model.linears().into_iter().all(dense));
    let rtn = Rtn::new();
    models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
    let error = models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap_err();
    assert!(matches!(
        error,
        Error::Peft(peft::Error::AlreadyQuantized { .. })
    ));
}

/// A GPTQ checkpoint gives back the result of OPTQ with scales in f16, bit for bit.
#[test]
fn optq_is_saved_for_gptq() {
    let batches = batches(8);
    let optq = Optq::new().with_group_size(8).with_f16_scales(true);
    let v1 = CheckpointFormat::Gptq(GptqVersion::V1);
    let v2 = CheckpointFormat::Gptq(GptqVersion::V2);
    for (optq, format) in [
        (optq, v2),
        (optq.with_order(Order::DescendingRegrouped), v2),
        (optq.with_symmetric(true), v1),
        (
            optq.with_symmetric(true)
                .with_order(Order::DescendingByGroup),
            v1,
        ),
        (optq.with_bits(8).with_range(GroupRange::Clipped), v2),
    ] {
        let (dir, mut lm) = pretrained(llama_config(), 3);
        quantize(&mut lm.model, &optq, &batches, |_| {}).unwrap();
        let out = dir.path().join("out");
        save_as(&lm, &out, format).unwrap();
        let again = load(&out, &Device::flex()).unwrap();
        assert_eq!(Fingerprint::of(&again.model), Fingerprint::of(&lm.model));
    }
}
