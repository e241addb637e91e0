//! The laws of a language model and of its directories, and the inputs that are refused.

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use models::{
    Activation, Config, Error, LlamaConfig, Model, OptConfig, Pretrained, RopeScaling, Windows,
    load, quantize_head, save,
};
use peft::{Batch, Blocks, CausalLm, FitConfig, Linears, Lora, Peqa, Spans, Weight};
use proptest::prelude::*;
use quant_core::{DoubleQuant, Format, NormalFloat, Optq, Precision, Quantizer, Rtn};
use tempfile::TempDir;

fn config(n_kv: usize, bias: bool, tied: bool) -> LlamaConfig {
    LlamaConfig {
        vocab_size: 16,
        hidden_size: 24,
        intermediate_size: 20,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: n_kv,
        head_dim: 8,
        max_position_embeddings: 32,
        sliding_window: None,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        attention_bias: bias,
        attention_output_bias: bias,
        mlp_bias: bias,
        tie_word_embeddings: tied,
    }
}

/// A directory with a tokenizer of 16 words, and a model no parameter of which is a round number.
fn pretrained(config: impl Into<Config>, seed: u64) -> (TempDir, Pretrained) {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = dir.path().join("tokenizer.json");
    write_tokenizer(&tokenizer, 16);
    let model = Model::init(config, seed, &Device::flex()).map(&mut Unround);
    let lm = Pretrained::new(model, &tokenizer).unwrap();
    (dir, lm)
}

/// Moves every element by its own amount.
struct Unround;

impl ModuleMapper for Unround {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|values| {
            let shape = values.shape();
            let at = Tensor::<1, Int>::arange(0..shape.num_elements() as i64, &Device::flex());
            values + at.float().sin().reshape(shape) * 0.1
        })
    }
}

fn write_tokenizer(path: &Path, n_words: usize) {
    let words: Vec<String> = (0..n_words).map(|id| format!("\"w{id}\":{id}")).collect();
    let json = format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":{{"type":"Whitespace"}},"post_processor":null,"decoder":null,
        "model":{{"type":"WordLevel","vocab":{{{}}},"unk_token":"w0"}}}}"#,
        words.join(",")
    );
    fs::write(path, json).unwrap();
}

fn tokens(ids: &[i32], n: usize) -> Tensor<2, Int> {
    Tensor::from_data(
        TensorData::new(ids.to_vec(), [n, ids.len() / n]),
        &Device::flex(),
    )
}

fn logits(model: &Model, ids: &[i32], n: usize) -> Vec<f32> {
    model
        .forward(tokens(ids, n))
        .into_data()
        .try_into_vec()
        .unwrap()
}

fn bits(values: Vec<f32>) -> Vec<u32> {
    values.into_iter().map(f32::to_bits).collect()
}

/// LLaMAs, Qwen2's among them, and OPTs of both styles.
fn configs() -> impl Strategy<Value = Config> {
    let n_kv = prop::sample::select(vec![1, 2, 4]);
    let llama = (n_kv, any::<bool>(), any::<bool>(), any::<bool>());
    let llama = llama.prop_map(|(n_kv, bias, output_bias, tied)| {
        Config::Llama(LlamaConfig {
            // Biases of queries, keys and values alone are Qwen2's, whose MLP has none.
            attention_output_bias: bias && output_bias,
            mlp_bias: bias && output_bias,
            ..config(n_kv, bias, tied)
        })
    });
    let width = prop::sample::select(vec![24, 16]);
    let activation = prop::sample::select(vec![
        Activation::Relu,
        Activation::Gelu,
        Activation::GeluTanh,
    ]);
    let flags = [any::<bool>(); 5];
    let opt = (width, activation, flags);
    let opt = opt.prop_map(
        |(width, activation, [before, remove, bias, affine, tied])| {
            Config::Opt(OptConfig {
                vocab_size: 16,
                hidden_size: 24,
                ffn_dim: 20,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                max_position_embeddings: 32,
                word_embed_proj_dim: width,
                do_layer_norm_before: before,
                remove_final_layer_norm: remove,
                activation,
                enable_bias: bias,
                layer_norm_elementwise_affine: affine,
                tie_word_embeddings: tied,
            })
        },
    );
    prop_oneof![llama, opt]
}

/// With zeros, without, and with scales as codes.
fn head_quantizer(at: usize) -> Box<dyn Quantizer> {
    let double = DoubleQuant::dynamic();
    match at {
        0 => Box::new(Rtn::new().with_group_size(8)),
        1 => Box::new(Rtn::new().with_bits(3).with_symmetric(true)),
        _ => Box::new(
            NormalFloat::new()
                .with_block_size(8)
                .with_double_quant(double),
        ),
    }
}

const PROBE: [i32; 12] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Another token changes no logit before it, and some after it.
    #[test]
    fn no_token_sees_the_future(config in configs(), at in 0..12usize, seed in 0..100u64) {
        let model = Model::init(&config, seed, &Device::flex());
        let mut other = PROBE;
        other[at] = 15 - other[at];
        let (first, second) = (logits(&model, &PROBE, 1), logits(&model, &other, 1));
        let width = config.vocab_size();
        for (position, (first, second)) in first.chunks(width).zip(second.chunks(width)).enumerate() {
            let largest = first.iter().zip(second).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let as_it_should = if position < at { largest < 1e-6 } else { largest > 0.0 };
            prop_assert!(as_it_should, "position {position} changed by {largest}");
        }
    }

    /// A sequence has the same logits beside another one.
    #[test]
    fn sequences_of_a_batch_are_independent(config in configs(), seed in 0..100u64) {
        let model = Model::init(&config, seed, &Device::flex());
        let reversed: Vec<i32> = PROBE.iter().rev().copied().collect();
        let alone = [logits(&model, &PROBE, 1), logits(&model, &reversed, 1)].concat();
        let together = logits(&model, &[PROBE.to_vec(), reversed].concat(), 2);
        for (a, b) in alone.iter().zip(&together) {
            prop_assert!((a - b).abs() < 1e-5);
        }
    }

    /// Texts one after the other in a row have the losses that each has alone, and so have texts that
    /// are filled up on either side; nothing of the others is seen, bit for bit.
    #[test]
    fn texts_of_a_row_do_not_see_each_other(
        config in configs(),
        cut in 2..10usize,
        n_fill in 0..3usize,
        seed in 0..100u64,
    ) {
        let model = Model::init(&config, seed, &Device::flex()).map(&mut Unround);
        let (first, second) = PROBE.split_at(cut);
        let nll = |batch: &Batch| -> Vec<f32> {
            peft::token_nll(&model, batch).into_data().try_into_vec().unwrap()
        };
        let alone = |text: &[i32]| nll(&Batch::new(tokens(text, 1)).unwrap());
        let starts: Vec<usize> = (0..12).map(|at| if at < cut { 0 } else { cut }).collect();
        let packed = Batch::new(tokens(&PROBE, 1)).unwrap().with_starts(&starts).unwrap();
        prop_assert_eq!(packed.n_targets(), 10);
        let mut expected = alone(first);
        expected.push(0.0);
        expected.extend(alone(second));
        let found = nll(&packed);
        let near = |a: &[f32], b: &[f32]| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5)
        };
        prop_assert!(near(&found, &expected), "{found:?}, {expected:?}");

        // The first text changes nothing of the second one's.
        let mut other = PROBE;
        other[..cut].reverse();
        let other = Batch::new(tokens(&other, 1)).unwrap().with_starts(&starts).unwrap();
        prop_assert_eq!(bits(nll(&other)[cut..].to_vec()), bits(found[cut..].to_vec()));

        for (before, after) in [(n_fill, 0), (0, n_fill), (n_fill, 1)] {
            let ids = [&vec![7; before], first, &vec![3; after]].concat();
            let is_text: Vec<bool> =
                (0..ids.len()).map(|at| (before..before + cut).contains(&at)).collect();
            let batch = Batch::new(tokens(&ids, 1)).unwrap().with_padding(&is_text).unwrap();
            prop_assert_eq!(batch.n_targets(), cut - 1);
            let found = nll(&batch);
            let own = &found[before..before + cut - 1];
            prop_assert!(near(own, &alone(first)), "{found:?}");
            let rest = found[..before].iter().chain(&found[before + cut - 1..]);
            prop_assert!(rest.into_iter().all(|&loss| loss == 0.0));
        }
    }

    /// A step on texts of one row is a step on the same texts in rows of their own, however the tokens
    /// to be learned are chosen.
    #[test]
    fn a_packed_row_trains_as_its_texts(
        config in configs(),
        cut in 3..10usize,
        first_target in 0..3usize,
        seed in 0..100u64,
    ) {
        let mut model = Model::init(&config, seed, &Device::flex()).map(&mut Unround).no_grad();
        let lora = Lora::new(2).with_seed(seed);
        peft::attach(&mut model, &lora).unwrap();
        let is_target: Vec<bool> = (0..12)
            .map(|at| (first_target..cut).contains(&at) || at > cut + 1)
            .collect();
        let starts: Vec<usize> = (0..12).map(|at| if at < cut { 0 } else { cut }).collect();
        let packed = Batch::new(tokens(&PROBE, 1)).unwrap();
        let packed = packed.with_starts(&starts).unwrap().with_targets(&is_target).unwrap();
        let alone = |range: std::ops::Range<usize>| {
            let batch = Batch::new(tokens(&PROBE[range.clone()], 1)).unwrap();
            batch.with_targets(&is_target[range])
        };
        let unpacked: Vec<Batch> = [alone(0..cut), alone(cut..12)].into_iter().flatten().collect();
        let run = |batches: &[Batch]| {
            let mut model = model.clone();
            let fit = FitConfig::new().with_steps(Some(1)).with_accumulation(batches.len());
            let mut steps = Vec::new();
            peft::fit(&mut model, batches, &fit, |step| steps.push(step.clone())).unwrap();
            (steps.remove(0), logits(&model, &PROBE, 1))
        };
        let ((one, first), (many, second)) = (run(&[packed]), run(&unpacked));
        prop_assert_eq!(one.n_targets, many.n_targets);
        prop_assert!((one.loss - many.loss).abs() < 1e-5, "{} {}", one.loss, many.loss);
        prop_assert!((one.grad_norm / many.grad_norm - 1.0).abs() < 1e-3);
        // AdamW makes a whole step of any gradient, of rounding too.
        for (a, b) in first.iter().zip(&second) {
            prop_assert!((a - b).abs() < 2e-2, "{a} {b}");
        }
    }

    /// Blocks that are run again train the model to the same bits: its adapters, or all of it.
    #[test]
    fn checkpointing_changes_no_bit(config in configs(), seed in 0..100u64, packed in any::<bool>()) {
        let mut model = Model::init(&config, seed, &Device::flex());
        if packed {
            let rtn = Rtn::new().with_group_size(8);
            models::quantize(&mut model, &rtn, &[], |_| {}).unwrap();
            quantize_head(&mut model, &rtn).unwrap();
            model = model.no_grad();
            peft::attach(&mut model, &Peqa::new()).unwrap();
        }
        let batches = [Batch::new(tokens(&PROBE, 2)).unwrap()];
        let run = |checkpoint_blocks| {
            let mut model = model.clone();
            let fit = FitConfig::new()
                .with_steps(Some(3))
                .with_checkpoint_blocks(checkpoint_blocks);
            let mut steps = Vec::new();
            peft::fit(&mut model, &batches, &fit, |step| steps.push(step.clone())).unwrap();
            (steps, bits(logits(&model, &PROBE, 1)))
        };
        prop_assert_eq!(run(true), run(false));
    }

    /// All products with packed weights are computed in 16 bits, the head's too, and the setting is
    /// taken back without a trace.
    #[test]
    fn the_precision_of_products_is_a_setting(config in configs(), seed in 0..100u64) {
        let mut model = Model::init(&config, seed, &Device::flex()).map(&mut Unround);
        let rtn = Rtn::new().with_group_size(16);
        quantize_head(&mut model, &rtn).unwrap();
        let of_head = |model: &Model| logits(model, &PROBE, 1);
        let full = of_head(&model);
        peft::set_precision(&mut model, Precision::Fast);
        let fast = of_head(&model);
        let largest = full.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
        let off = full.iter().zip(&fast).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        prop_assert!(off <= 1e-3 * largest, "{off} of {largest}");
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vbmi2") {
            prop_assert!(off > 0.0, "the head is computed as before");
        }
        models::quantize(&mut model, &rtn, &[], |_| {}).unwrap();
        peft::set_precision(&mut model, Precision::Full);
        let full = of_head(&model);
        peft::set_precision(&mut model, Precision::Fast);
        peft::set_precision(&mut model, Precision::Full);
        prop_assert_eq!(bits(of_head(&model)), bits(full));
    }

    /// A packed head is the one that its quantizer makes of the dense one, logits are products with
    /// it, and tokens are looked up as before.
    #[test]
    fn a_packed_head_is_the_head_of_all_logits(
        config in configs(),
        quantizer in 0..3usize,
        seed in 0..100u64,
    ) {
        let mut model = Model::init(&config, seed, &Device::flex()).map(&mut Unround);
        let quantizer = head_quantizer(quantizer);
        let x = output(&model);
        let expected = quantizer.quantize(model.head().to_dense(), None).unwrap().weight;
        let report = quantize_head(&mut model, &quantizer).unwrap();
        prop_assert_eq!(report.error.weight, expected.distortion(dense_head(&config, seed)));
        prop_assert_eq!(head_format(&model), Some(quantizer.format().unwrap()));
        prop_assert!(!model.config().tie_word_embeddings());
        let head: Vec<f32> = model.head().to_dense().into_data().try_into_vec().unwrap();
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

    /// A directory gives the model back, bit for bit, dense or in any format.
    #[test]
    fn a_saved_model_is_the_model(
        config in configs(),
        bits_of in prop::option::of(prop::sample::select(vec![2, 3, 4, 8])),
        group_size in prop::sample::select(vec![None, Some(8), Some(7)]),
        symmetric in any::<bool>(),
        head in prop::option::of(0..3usize),
    ) {
        let (dir, mut lm) = pretrained(&config, 5);
        let head = head.map(head_quantizer);
        if let Some(quantizer) = &head {
            quantize_head(&mut lm.model, quantizer).unwrap();
        }
        if let Some(n) = bits_of {
            let rtn = Rtn::new().with_bits(n).with_group_size(group_size).with_symmetric(symmetric);
            models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
        }
        let out = dir.path().join("saved");
        save(&lm, &out).unwrap();
        let again = load(&out, &Device::flex()).unwrap();
        prop_assert_eq!(bits(logits(&again.model, &PROBE, 2)), bits(logits(&lm.model, &PROBE, 2)));
        prop_assert_eq!(peft::Fingerprint::of(&again.model), peft::Fingerprint::of(&lm.model));
        prop_assert_eq!(again.model.config(), lm.model.config());
        prop_assert_eq!(head_format(&again.model), head.map(|head| head.format().unwrap()));
        let twice = dir.path().join("twice");
        save(&again, &twice).unwrap();
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            prop_assert_eq!(fs::read(out.join(name)).unwrap(), fs::read(twice.join(name)).unwrap());
        }
    }
}

/// What the head reads of the probe.
fn output(model: &Model) -> Vec<f32> {
    let positions = model.positions(&Spans::whole(PROBE.len(), &Device::flex()));
    let x = model.embed(tokens(&PROBE, 1), &positions);
    let x = (0..model.n_blocks()).fold(x, |x, block| model.block(block, x, &positions));
    model.norm(x).into_data().try_into_vec().unwrap()
}

fn dense_head(config: &Config, seed: u64) -> Tensor<2> {
    let model = Model::init(config, seed, &Device::flex());
    model.map(&mut Unround).head().to_dense()
}

fn head_format(model: &Model) -> Option<Format> {
    let weights = model.other_weights();
    let head = weights.iter().find(|(path, _)| path == "lm_head");
    head.and_then(|(_, head)| head.format())
}

fn text() -> String {
    (0..400).map(|i| format!("w{} ", i * i % 13)).collect()
}

/// The whole path, and the number of threads has no part in it.
#[test]
fn quantize_tune_merge_save_and_reload_is_one_model_on_any_number_of_threads() {
    let run = || {
        let device = Device::flex();
        let (dir, mut lm) = pretrained(config(2, true, false), 1);
        let batches = lm
            .windows(&text(), 20)
            .unwrap()
            .shuffled(3)
            .batches(4, &device);
        assert_eq!(
            batches.iter().map(|b| b.tokens().dims()[0]).sum::<usize>(),
            20
        );
        let rtn = Rtn::new().with_bits(3).with_group_size(8);
        let layers = models::quantize(&mut lm.model, &rtn, &[], |_| {}).unwrap();
        assert_eq!(layers.len(), 14);
        assert_eq!(layers[0].path, "model.layers.0.self_attn.q_proj");
        let nll = |model: &Model| -> f64 {
            let nll = batches.iter().map(|batch| peft::token_nll(model, batch));
            nll.flat_map(|nll| nll.into_data().try_into_vec::<f32>().unwrap())
                .map(f64::from)
                .sum()
        };
        let before = nll(&lm.model);
        peft::attach(&mut lm.model, &Peqa::new()).unwrap();
        let fit = FitConfig::new().with_learning_rate(0.02).with_epochs(4);
        peft::fit(&mut lm.model, &batches, &fit, |_| {}).unwrap();
        let tuned = nll(&lm.model);
        assert!(tuned < before, "{tuned} after {before}");
        assert!(matches!(
            save(&lm, dir.path().join("unmerged")),
            Err(Error::Peft(peft::Error::AlreadyAdapted { .. }))
        ));
        let tuned = bits(logits(&lm.model, &PROBE, 2));
        let certificate = peft::merge(&mut lm.model).unwrap();
        save(&lm, dir.path().join("out")).unwrap();
        let again = load(dir.path().join("out"), &device).unwrap();
        certificate.verify(&again.model).unwrap();
        assert_eq!(bits(logits(&again.model, &PROBE, 2)), tuned);
        tuned
    };
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(run)
    };
    let one = on(1);
    assert_eq!(on(2), one);
    assert_eq!(on(5), one);
}

#[test]
fn windows_do_not_overlap_and_leave_out_the_rest() {
    let windows = Windows::new((0..11).collect(), 3).unwrap();
    assert_eq!(windows.len(), 3);
    let batches = windows.batches(2, &Device::flex());
    let ids = |batch: &Batch| {
        batch
            .tokens()
            .into_data()
            .convert::<i32>()
            .try_into_vec::<i32>()
            .unwrap()
    };
    assert_eq!(ids(&batches[0]), [0, 1, 2, 3, 4, 5]);
    assert_eq!(ids(&batches[1]), [6, 7, 8]);
    assert_eq!(windows.clone().take(2).len(), 2);
    let mut shuffled: Vec<i32> = windows
        .shuffled(1)
        .batches(3, &Device::flex())
        .iter()
        .flat_map(ids)
        .collect();
    assert!(shuffled.chunks(3).all(|window| window[0] + 2 == window[2]));
    shuffled.sort_unstable();
    assert_eq!(shuffled, (0..9).collect::<Vec<_>>());
}

#[test]
fn texts_that_do_not_fit_are_refused() {
    let (dir, lm) = pretrained(config(2, false, true), 1);
    let short = lm.windows("w1 w2 w3", 8).unwrap_err();
    assert!(matches!(
        short,
        Error::ShortText {
            n_tokens: 3,
            seq_len: 8
        }
    ));
    for seq_len in [0, 1, 33] {
        let error = lm.windows(&text(), seq_len).unwrap_err();
        assert!(matches!(error, Error::SeqLen { max: 32, .. }), "{error}");
    }
    // A tokenizer with more words than the model has rows.
    let tokenizer = dir.path().join("larger.json");
    write_tokenizer(&tokenizer, 20);
    let larger = Pretrained::new(lm.model, &tokenizer).unwrap();
    assert!(larger.windows(&text(), 8).is_ok());
    let error = larger.windows("w1 w17 w1 w1", 2).unwrap_err();
    assert!(matches!(
        error,
        Error::Peft(peft::Error::Token {
            token: 17,
            vocab_size: 16
        })
    ));
}

/// Whatever a tokenizer's file says of cutting and filling up, a text's tokens are all of it.
#[test]
fn texts_are_neither_cut_nor_filled_up() {
    let (dir, lm) = pretrained(config(2, false, true), 1);
    let path = dir.path().join("cutting.json");
    let json = fs::read_to_string(dir.path().join("tokenizer.json")).unwrap();
    let json = json
        .replace(
            "\"truncation\":null",
            r#""truncation":{"direction":"Right","max_length":4,"strategy":"LongestFirst","stride":0}"#,
        )
        .replace(
            "\"padding\":null",
            r#""padding":{"strategy":{"Fixed":900},"direction":"Right","pad_to_multiple_of":null,
            "pad_id":0,"pad_type_id":0,"pad_token":"w0"}"#,
        );
    fs::write(&path, json).unwrap();
    let cutting = Pretrained::new(lm.model, &path).unwrap();
    assert_eq!(cutting.windows(&text(), 8).unwrap().len(), 50);
}

/// A saved quantized model of which one file is changed.
struct Damage {
    dir: TempDir,
    path: PathBuf,
}

impl Damage {
    fn new() -> Self {
        let (dir, mut lm) = pretrained(config(2, false, false), 1);
        models::quantize(&mut lm.model, &Rtn::new().with_group_size(8), &[], |_| {}).unwrap();
        let path = dir.path().join("model");
        save(&lm, &path).unwrap();
        Self { dir, path }
    }

    fn error(&self) -> Error {
        load(&self.path, &Device::flex()).unwrap_err()
    }

    /// The message after a replacement in `config.json`.
    fn config(from: &str, to: &str) -> String {
        let damage = Self::new();
        let path = damage.path.join("config.json");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{from} in {text}");
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        damage.error().to_string()
    }

    /// The message after a change to the header of the weights.
    fn header(from: &str, to: &str) -> String {
        let damage = Self::new();
        let path = damage.path.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(bytes[8..8 + n].to_vec()).unwrap();
        assert!(header.contains(from), "{from} in {header}");
        let header = header.trim_end().replacen(from, to, 1);
        let mut changed = (header.len() as u64).to_le_bytes().to_vec();
        changed.extend_from_slice(header.as_bytes());
        changed.extend_from_slice(&bytes[8 + n..]);
        fs::write(&path, changed).unwrap();
        damage.error().to_string()
    }
}

#[track_caller]
fn assert_says(message: String, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn configurations_that_make_no_model_are_refused() {
    let says = |from: &str, to: &str, parts: &[&str]| {
        let message = Damage::config(from, to);
        assert_says(message, &[&["config.json"], parts].concat());
    };
    says(
        "\"model_type\": \"llama\"",
        "\"model_type\": \"mamba\"",
        &["`mamba`", "supported: llama"],
    );
    says(
        "\"num_attention_heads\": 4",
        "\"num_attention_heads\": 0",
        &["num_attention_heads is 0"],
    );
    says(
        "\"num_key_value_heads\": 2",
        "\"num_key_value_heads\": 3",
        &["is 3", "4 heads"],
    );
    says("\"head_dim\": 8", "\"head_dim\": 7", &["head_dim is 7"]);
    says(
        "\"num_hidden_layers\": 2",
        "\"num_hidden_layers\": 0",
        &["num_hidden_layers is 0"],
    );
    says(
        "\"vocab_size\": 16",
        "\"vocab_size\": 99999999999",
        &["vocab_size is 99999999999"],
    );
    says(
        "\"vocab_size\": 16",
        "\"vocab_size\": -1",
        &["cannot be read"],
    );
    says(
        "\"rms_norm_eps\": ",
        "\"rms_norm_eps\": -",
        &["rms_norm_eps"],
    );
    says(
        "\"rope_theta\": 10000.0",
        "\"rope_theta\": -3",
        &["rope_theta is -3"],
    );
    says(
        "\"rope_scaling\": null",
        "\"rope_scaling\": {\"type\": \"su\", \"factor\": 2}",
        &["type `su`"],
    );
    says(
        "\"rope_scaling\": null",
        "\"rope_scaling\": {\"type\": \"linear\"}",
        &["no factor"],
    );
    says(
        "\"hidden_act\": \"silu\"",
        "\"hidden_act\": \"gelu\"",
        &["`gelu`"],
    );
    says(
        "\"quant_method\": \"quant-core\"",
        "\"quant_method\": \"awq\"",
        &["`awq`"],
    );
    let both = "\"rope_scaling\": {\"type\": \"linear\", \"rope_type\": \"linear\"}";
    says("\"rope_scaling\": null", both, &["no factor"]);
    says(
        "\"layers\": {",
        "\"layers\": {\"lm_tail\": {\"bits\": 4, \"group_size\": 8, \"grid\": \"affine\"},",
        &["`lm_tail`"],
    );
    says("\"bits\": 4", "\"bits\": 5", &["not 5"]);
    says("\"group_size\": 8", "\"group_size\": 0", &["group size 0"]);
    says("{", "{{", &["line 1"]);
}

#[test]
fn weights_that_do_not_fit_are_refused() {
    let message = Damage::config("\"hidden_size\": 24", "\"hidden_size\": 32");
    assert_says(
        message,
        &["model.embed_tokens.weight", "[16, 24]", "[16, 32]"],
    );
    let message = Damage::config("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    assert_says(
        message,
        &["no tensor `model.layers.2.input_layernorm.weight`"],
    );
    let message = Damage::config("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
    assert_says(message, &["model.layers.1.", "no projection"]);
    let (dir, lm) = pretrained(config(2, false, false), 1);
    let path = dir.path().join("dense");
    save(&lm, &path).unwrap();
    let text = fs::read_to_string(path.join("config.json")).unwrap();
    let text = text.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
    fs::write(path.join("config.json"), text).unwrap();
    let error = load(&path, &Device::flex()).unwrap_err();
    assert_says(error.to_string(), &["model.layers.1.", "no place"]);
    let message = Damage::config("\"group_size\": 8", "\"group_size\": 25");
    assert_says(message, &["layer `model.layers.0.mlp.down_proj`"]);
    let message = Damage::header("model.norm.weight", "model.norm.other");
    assert_says(message, &["no tensor `model.norm.weight`"]);
    let message = Damage::header("[24]", "[12]");
    assert_says(message, &["model.safetensors", "header"]);
    let message = Damage::header("\"I32\"", "\"U8\"");
    assert_says(message, &["header"]);
    let message = Damage::header("BF16", "XF16");
    assert_says(message, &["header"]);
}

#[test]
fn damaged_files_are_refused_at_every_length() {
    let damage = Damage::new();
    let path = damage.path.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for n in [0, 1, 7, 8, 9, 100, 1000, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&path, &bytes[..n]).unwrap();
        let error = damage.error();
        assert!(
            matches!(error, Error::File(tensor_files::Error::File { .. })),
            "{n}: {error}"
        );
    }
    fs::write(&path, [&bytes[..], &[0]].concat()).unwrap();
    assert_says(
        damage.error().to_string(),
        &["model.safetensors", "describes"],
    );
    fs::write(&path, [&u64::MAX.to_le_bytes(), &bytes[8..]].concat()).unwrap();
    assert_says(damage.error().to_string(), &["claims a header"]);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(matches!(
        damage.error(),
        Error::File(tensor_files::Error::File { .. } | tensor_files::Error::Io { .. })
    ));
    fs::remove_dir(&path).unwrap();
    assert!(matches!(damage.error(), Error::NoWeights { .. }));
    fs::write(damage.path.join("pytorch_model.bin"), "x").unwrap();
    assert_says(damage.error().to_string(), &["convert it"]);
    fs::write(damage.path.join("tokenizer.json"), "{}").unwrap();
    assert!(matches!(damage.error(), Error::Tokenizer { .. }));
    fs::remove_file(damage.path.join("config.json")).unwrap();
    assert!(matches!(
        damage.error(),
        Error::File(tensor_files::Error::Io { .. })
    ));
}

/// A dense golden directory cut into two shards.
fn sharded(change: impl Fn(&mut String)) -> (TempDir, Result<Pretrained, Error>) {
    let dir = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama_bf16");
    fs::copy(golden.join("config.json"), dir.path().join("config.json")).unwrap();
    fs::copy(
        golden.join("model.safetensors"),
        dir.path().join("one.safetensors"),
    )
    .unwrap();
    let file = tensor_files::TensorFile::open(&golden.join("model.safetensors")).unwrap();
    let map: Vec<String> = file
        .names()
        .iter()
        .map(|name| format!("\"{name}\": \"one.safetensors\""))
        .collect();
    let mut index = format!("{{\"weight_map\": {{{}}}}}", map.join(", "));
    change(&mut index);
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    let loaded = load(dir.path(), &Device::flex());
    (dir, loaded)
}

#[test]
fn indices_are_followed_and_not_trusted() {
    let (_dir, loaded) = sharded(|_| ());
    let lm = loaded.unwrap();
    assert!(
        lm.windows("x", 8)
            .unwrap_err()
            .to_string()
            .contains("tokenizer.json")
    );

    let refused = |from: &'static str, to: &'static str| {
        let (_dir, loaded) = sharded(|index| *index = index.replacen(from, to, 1));
        loaded.unwrap_err()
    };
    let error = refused("one.safetensors", "two.safetensors");
    assert!(matches!(&error, Error::MissingShard { shard, .. } if shard == "two.safetensors"));
    for to in [
        "../one.safetensors",
        "/one.safetensors",
        "a/one.safetensors",
        "..",
        "",
    ] {
        assert_says(
            refused("one.safetensors", to).to_string(),
            &["index.json", "not the name"],
        );
    }
    let error = refused("model.norm.weight", "model.norm.bias");
    assert_says(error.to_string(), &["no tensor `model.norm.bias`"]);
    assert_says(refused("{", "[").to_string(), &["index.json"]);
}

#[test]
fn a_value_that_is_not_finite_is_named() {
    let damage = Damage::new();
    let path = damage.path.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    let offsets = &header["model.layers.1.mlp.up_proj.scales"]["data_offsets"];
    let at = 8 + n + offsets[0].as_u64().unwrap() as usize;
    bytes[at + 4..at + 8].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    assert_says(
        damage.error().to_string(),
        &["model.layers.1.mlp.up_proj.scales", "element 1 is NaN"],
    );
}

#[test]
fn what_is_there_is_not_overwritten() {
    let damage = Damage::new();
    let lm = load(&damage.path, &Device::flex()).unwrap();
    let before = fs::read(damage.path.join("model.safetensors")).unwrap();
    let error = save(&lm, &damage.path).unwrap_err();
    assert!(matches!(
        error,
        Error::File(tensor_files::Error::OutputExists { .. })
    ));
    assert_eq!(
        fs::read(damage.path.join("model.safetensors")).unwrap(),
        before
    );
    let other = damage.dir.path().join("notes");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("notes.txt"), "mine").unwrap();
    assert!(save(&lm, &other).is_err());
    assert_eq!(fs::read_dir(&other).unwrap().count(), 1);
}

/// A directory of a model with a packed head that is no such model, or another one.
#[test]
fn a_packed_head_is_in_the_configuration_and_in_the_fingerprint() {
    let (dir, mut lm) = pretrained(config(2, false, true), 1);
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
        let (_dir, mut lm) = pretrained(config(2, false, tied), 1);
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

#[test]
fn quantizing_refuses_before_it_changes_anything() {
    let (_dir, mut lm) = pretrained(config(2, false, false), 1);
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
