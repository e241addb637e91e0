//! A packed head.

use std::fs;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use models::{Config, Error, Model, load, quantize_head, save};
use peft::{Blocks, CausalLm, Spans};
use proptest::prelude::*;
use quant_core::{NormalFloat, Optq, Quantizer, Rtn};

use super::fixtures::*;

proptest! {
    #![proptest_config(cases(24))]

    /// A packed head is the one that its quantizer makes of the dense one, logits are products with
    /// it, and tokens are looked up as before.
    #[test]
    fn a_packed_head_is_the_head_of_all_logits(
        config in configs().prop_filter("products alone", has_plain_head),
        quantizer in 0..3usize,
        seed in 0..100u64,
    ) {
        let mut model = Model::init(&config, seed, &Device::flex()).map(&mut Unround);
        let quantizer = head_quantizer(quantizer);
        let x = output(&model);
        let expected = quantizer.quantize(model.head().weight().to_dense(), None).unwrap().weight;
        let report = quantize_head(&mut model, &quantizer).unwrap();
        prop_assert_eq!(report.error.weight, expected.distortion(dense_head(&config, seed)));
        prop_assert_eq!(head_format(&model), Some(quantizer.format().unwrap()));
        prop_assert!(!model.config().tie_word_embeddings());
        let head: Vec<f32> = model.head().weight().to_dense().into_data().try_into_vec().unwrap();
        let unpacked: Vec<f32> = expected.dequantize().into_data().try_into_vec().unwrap();
        prop_assert_eq!(bits(head.clone()), bits(unpacked));
        prop_assert_eq!(bits(output(&model)), bits(x.clone()));

        let vocab = config.vocab_size();
        let logits = logits(&model, &PROBE, 1);
        let largest = logits.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
        for (row, logits) in x.chunks(x.len() / PROBE.len()).zip(logits.chunks(vocab)) {
            for (token, logit) in logits.iter().enumerate() {
                let column = head[token..].iter().step_by(vocab);
                let terms = row.iter().zip(column).map(|(&x, &w)| f64::from(x) * f64::from(w));
                let off = (terms.sum::<f64>() - f64::from(*logit)).abs();
                prop_assert!(off <= f64::from(1e-5 * largest), "off by {off}, largest {largest}");
            }
        }
    }
}

/// Whether logits are the products with the head, without a bias or a soft cap.
fn has_plain_head(config: &Config) -> bool {
    !matches!(config, Config::Gemma2(_) | Config::GptJ(_))
}

/// The input of the head for the probe.
fn output(model: &Model) -> Vec<f32> {
    let positions = model.positions(&Spans::whole(PROBE.len(), &Device::flex()));
    let x = model.embed(tokens(&PROBE, 1), &positions);
    let x = (0..model.n_blocks()).fold(x, |x, block| model.block(block, x, &positions));
    model.norm(x).into_data().try_into_vec().unwrap()
}

fn dense_head(config: &Config, seed: u64) -> Tensor<2> {
    let model = Model::init(config, seed, &Device::flex());
    model.map(&mut Unround).head().weight().to_dense()
}

/// A directory of a model with a packed head that is no such model, or another one.
#[test]
fn a_packed_head_is_in_the_configuration_and_in_the_fingerprint() {
    let (dir, mut lm) = pretrained(llama().with_tie_word_embeddings(true), 1);
    quantize_head(&mut lm.model, &NormalFloat::new().with_block_size(8)).unwrap();
    let path = dir.path().join("model");
    save(&lm, &path).unwrap();
    let text = fs::read_to_string(path.join("config.json")).unwrap();
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{from} in {text}");
        fs::write(path.join("config.json"), text.replacen(from, to, 1)).unwrap();
        load(&path, &Device::flex())
    };
    let tie = |tied: bool| format!("\"tie_word_embeddings\": {tied}");
    let error = with(&tie(false), &tie(true)).unwrap_err();
    assert_says(error.to_string(), &["config.json", "`lm_head`", "no head"]);
    let error = with("\"lm_head\"", "\"lm_tail\"").unwrap_err();
    assert_says(error.to_string(), &["no tensor `lm_head.weight`"]);
    // The same numbers on another grid.
    let other = with("normal_float", "symmetric").unwrap().model;
    assert_ne!(
        peft::Fingerprint::of(&other),
        peft::Fingerprint::of(&lm.model)
    );
    assert!(logits(&other, &PROBE, 1) != logits(&lm.model, &PROBE, 1));
}

#[test]
fn a_head_that_cannot_be_quantized_stays_as_it_is() {
    for tied in [true, false] {
        let (_dir, mut lm) = pretrained(llama().with_tie_word_embeddings(tied), 1);
        let before = peft::Fingerprint::of(&lm.model);
        let quantizers: [(&dyn Quantizer, &str); 2] = [
            (&Optq::new().with_group_size(8), "needs the Gram"),
            (&Rtn::new().with_group_size(25), "group size 25"),
        ];
        for (quantizer, reason) in quantizers {
            let error = quantize_head(&mut lm.model, quantizer).unwrap_err();
            let Error::Peft(peft::Error::Quant { path, source }) = error else {
                panic!("{error}");
            };
            assert_eq!(path, "lm_head");
            assert_says(source.to_string(), &[reason]);
            assert_eq!(peft::Fingerprint::of(&lm.model), before);
            assert_eq!(lm.model.config().tie_word_embeddings(), tied);
        }
        quantize_head(&mut lm.model, &Rtn::new()).unwrap();
        let packed = peft::Fingerprint::of(&lm.model);
        assert_ne!(packed, before);
        let error = quantize_head(&mut lm.model, &Rtn::new()).unwrap_err();
        assert!(
            matches!(
                &error,
                Error::Peft(peft::Error::AlreadyQuantized { path }) if path == "lm_head"
            ),
            "{error}"
        );
        assert_eq!(peft::Fingerprint::of(&lm.model), packed);
    }
}
