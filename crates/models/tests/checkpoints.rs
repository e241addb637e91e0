//! Checkpoints of other programs: read, written back byte for byte, and refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use models::CheckpointFormat::{Bitsandbytes, Gptq, QuantCore};
use models::GptqVersion::{V1, V2};
use models::{
    CheckpointFormat, Error, LlamaConfig, Model, Pretrained, RopeScaling, load, save, save_as,
};
use peft::{Batch, CausalLm, Fingerprint, FitConfig, Linear, Linears, Peqa, Weight};
use proptest::prelude::*;
use quant_core::{
    DoubleQuant, Format, Grid, NormalFloat, Parts, QuantTensor, Quantizer, Rtn, ScaleLevels, Scales,
};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;
use tensor_files::{FloatType, LazyTensor, TensorFile, write_tensors};

mod reference;

use reference::{golden, tokens, values};

const GPTQ: &str = "llama_gptq_w4_g32_sym";
const NF4: &str = "llama_nf4_dq";

/// The project's own directory and, where it is beside it, the shared one.
fn directories(name: &str) -> Vec<PathBuf> {
    let mut all = vec![golden(name)];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shared = root.join("../../../shared/golden").join(name);
    if shared.exists() {
        all.push(shared);
    } else {
        eprintln!("skipped: no shared golden files beside the project");
    }
    all
}

/// Type, shape and bytes of each tensor.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(dir: &Path) -> Tensors {
    let bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let all = file.tensors().into_iter();
    all.map(|(name, t)| (name, (t.dtype(), t.shape().into(), t.data().into())))
        .collect()
}

fn write(dir: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap();
        (name, view)
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

fn floats(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let (twos, _) = bytes.as_chunks::<2>();
    let (fours, _) = bytes.as_chunks::<4>();
    match dtype {
        Dtype::BF16 => twos
            .iter()
            .map(|&b| half::bf16::from_le_bytes(b).to_f32())
            .collect(),
        Dtype::F16 => twos
            .iter()
            .map(|&b| half::f16::from_le_bytes(b).to_f32())
            .collect(),
        _ => fours.iter().map(|&b| f32::from_le_bytes(b)).collect(),
    }
}

fn parts(model: &Model) -> Vec<(String, Option<(Format, Parts)>)> {
    let linears = model.linears().into_iter();
    linears
        .map(|(path, linear)| match linear.weight() {
            Weight::Quant(weight) => (path, Some((weight.format(), weight.to_parts()))),
            Weight::Dense(_) => (path, None),
        })
        .collect()
}

/// A directory whose files may be changed.
fn copy(dir: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in ["config.json", "quantize_config.json", "model.safetensors"] {
        if dir.join(name).exists() {
            // Not `copy`, which would take the permissions along.
            fs::write(copy.path().join(name), fs::read(dir.join(name)).unwrap()).unwrap();
        }
    }
    copy
}

#[track_caller]
fn assert_says(message: impl ToString, parts: &[&str]) {
    let message = message.to_string();
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

/// The weights of the golden GPTQ checkpoint as transformers had them for the reference: in the
/// model's `bf16`, scales and products.
fn round_to_bf16(model: &mut Model) {
    let round = |value: f32| half::bf16::from_f32(value).to_f32();
    for (_, linear) in model.linears_mut() {
        change(linear, |parts, format| {
            if let Scales::Float(scales) = &mut parts.scales {
                scales.iter_mut().for_each(|scale| *scale = round(*scale));
            }
            format
        });
        let Weight::Quant(weight) = linear.weight() else {
            panic!("the weight is dense");
        };
        let dense: Vec<f32> = values(weight.dequantize()).into_iter().map(round).collect();
        let dense = TensorData::new(dense, weight.dims());
        let dense = Tensor::from_data(dense, &Device::flex());
        *linear = Linear::new(Weight::frozen(dense), None);
    }
}

/// The scales of the golden bitsandbytes checkpoint as its CPU kernel takes them: in each row from
/// `row * (160 / 64)` on, though the blocks straddle rows.
fn misplace_blocks(model: &mut Model) {
    for (path, linear) in model.linears_mut() {
        if path.ends_with("down_proj") {
            let [n_groups, repeated] = [160 / 32, 64 / 32];
            change(linear, |parts, format| {
                let Scales::Double(scales) = &mut parts.scales else {
                    panic!("the scales are floats");
                };
                let right = scales.codes.clone();
                for (k, code) in scales.codes.iter_mut().enumerate() {
                    let (row, group) = (k / n_groups, k % n_groups);
                    *code = right[(row * (160 / 64) + group / repeated) * repeated];
                }
                format
            });
        }
    }
}

fn logits_differ_by(model: &Model, dir: &Path, name: &str) -> Option<f32> {
    let path = dir.join("reference.safetensors");
    let mut reference = TensorFile::open(&path).unwrap();
    reference.contains(name).then(|| {
        let (expected, _) = reference.floats::<3>(name).unwrap();
        let found = values(model.forward(tokens(&path)));
        let differences = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
        differences.fold(0.0, f32::max)
    })
}

#[test]
fn logits_are_those_of_the_numbers_in_the_files() {
    for name in [GPTQ, NF4] {
        let lm = load(golden(name), &Device::flex()).unwrap();
        let differ = logits_differ_by(&lm.model, &golden(name), "logits_exact").unwrap();
        assert!(differ <= 1e-5, "{name}: logits differ by {differ}");
    }
}

/// Each program computes with other numbers than those that it wrote; see the files' README.
#[test]
fn logits_are_those_of_the_programs_that_packed_them() {
    for (name, as_they_do) in [
        (GPTQ, round_to_bf16 as fn(&mut Model)),
        (NF4, misplace_blocks),
    ] {
        for dir in directories(name) {
            let mut lm = load(&dir, &Device::flex()).unwrap();
            assert!(parts(&lm.model).iter().all(|(_, packed)| packed.is_some()));
            as_they_do(&mut lm.model);
            let differ = logits_differ_by(&lm.model, &dir, "logits").unwrap();
            assert!(differ <= 1e-5, "{name}: logits differ by {differ}");
        }
    }
}

/// All packed tensors byte for byte, `quant_state` included. Other tensors have the shortest type
/// that holds them, which is not always that of the file: bitsandbytes' norms of ones are `F32`.
#[test]
fn what_was_read_is_written_back_as_it_was() {
    for (name, format) in [(GPTQ, Gptq(V1)), (NF4, Bitsandbytes)] {
        for dir in directories(name) {
            let lm = load(&dir, &Device::flex()).unwrap();
            let out = tempfile::tempdir().unwrap();
            save_as(&lm, out.path().join("out"), format).unwrap();
            let (before, after) = (tensors(&dir), tensors(&out.path().join("out")));
            assert_eq!(
                before.keys().collect::<Vec<_>>(),
                after.keys().collect::<Vec<_>>()
            );
            let mut identical = 0;
            for (tensor, before) in &before {
                let after = &after[tensor];
                if tensor.contains("_proj.") || name == GPTQ {
                    assert!(before == after, "{tensor} in {name}");
                    identical += 1;
                }
                assert_eq!(before.1, after.1, "{tensor}");
                if before.0 != after.0 {
                    let same = floats(&before.2, before.0) == floats(&after.2, after.0);
                    assert!(same, "{tensor} in {name}");
                }
            }
            assert_eq!(identical, if name == GPTQ { 63 } else { 84 });
            let config = |dir: &Path, file: &str| -> Value {
                serde_json::from_slice(&fs::read(dir.join(file)).unwrap()).unwrap()
            };
            let written = config(&out.path().join("out"), "config.json");
            let original = config(&dir, "config.json");
            if format == Bitsandbytes {
                assert_eq!(written, original);
            } else {
                let written = &written["quantization_config"];
                for (setting, value) in written.as_object().unwrap() {
                    if setting != "meta" {
                        assert_eq!(&original["quantization_config"][setting], value);
                    }
                }
                let beside = config(&out.path().join("out"), "quantize_config.json");
                assert_eq!(*written, beside);
            }
            let again = load(out.path().join("out"), &Device::flex()).unwrap();
            assert_eq!(Fingerprint::of(&again.model), Fingerprint::of(&lm.model));
        }
    }
}

#[test]
fn packed_checkpoints_train_and_merge() {
    for name in [GPTQ, NF4] {
        let device = Device::flex();
        let dir = golden(name);
        let mut lm = load(&dir, &device).unwrap();
        let batch = Batch::new(tokens(&dir.join("reference.safetensors"))).unwrap();
        peft::attach(&mut lm.model, &Peqa::new()).unwrap();
        let before = parts(&lm.model);
        let mut steps = 0;
        let fit = FitConfig::new().with_learning_rate(1e-3);
        peft::fit(&mut lm.model, &[batch], &fit, |_| steps += 1).unwrap();
        assert_eq!(steps, 1);
        let certificate = peft::merge(&mut lm.model).unwrap();
        let after = parts(&lm.model);
        for ((path, before), (_, after)) in before.iter().zip(&after) {
            let (before, after) = (before.as_ref().unwrap(), after.as_ref().unwrap());
            assert_eq!(before.1.words, after.1.words, "{path}");
            assert_ne!(before.1.scales, after.1.scales, "{path}");
            assert!(matches!(after.1.scales, Scales::Float(_)));
        }
        let out = tempfile::tempdir().unwrap();
        save(&lm, out.path().join("out")).unwrap();
        let again = load(out.path().join("out"), &device).unwrap();
        certificate.verify(&again.model).unwrap();
        if name == GPTQ {
            let error = save_as(&lm, out.path().join("gptq"), Gptq(V1)).unwrap_err();
            assert_says(&error, &["quant-core", "that f16 does not hold exactly"]);
        } else {
            // Its blocks straddle rows, and each part of one has learnt a scale of its own: they
            // are blocks of 32 now.
            save_as(&lm, out.path().join("nf4"), Bitsandbytes).unwrap();
            let again = load(out.path().join("nf4"), &device).unwrap();
            certificate.verify(&again.model).unwrap();
            let tensors = tensors(&out.path().join("nf4"));
            let state = |layer: &str| {
                let name = format!("model.layers.0.{layer}.weight.quant_state.bitsandbytes__nf4");
                String::from_utf8(tensors[&name].2.clone()).unwrap()
            };
            assert_says(state("mlp.down_proj"), &["\"blocksize\": 32,"]);
            assert_says(state("mlp.up_proj"), &["\"blocksize\": 64,"]);
        }
    }
}

fn config(hidden: usize, inner: usize) -> LlamaConfig {
    LlamaConfig {
        vocab_size: 16,
        hidden_size: hidden,
        intermediate_size: inner,
        num_hidden_layers: 1,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        head_dim: 8,
        max_position_embeddings: 32,
        sliding_window: None,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        attention_bias: true,
        attention_output_bias: true,
        mlp_bias: false,
        tie_word_embeddings: false,
    }
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

/// A model no parameter of which is a round number.
fn pretrained(config: &LlamaConfig) -> (TempDir, Pretrained) {
    let dir = tempfile::tempdir().unwrap();
    let words: Vec<String> = (0..16).map(|id| format!("\"w{id}\":{id}")).collect();
    let tokenizer = format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":{{"type":"Whitespace"}},"post_processor":null,"decoder":null,
        "model":{{"type":"WordLevel","vocab":{{{}}},"unk_token":"w0"}}}}"#,
        words.join(",")
    );
    let path = dir.path().join("tokenizer.json");
    fs::write(&path, tokenizer).unwrap();
    let model = Model::init(config, 3, &Device::flex()).map(&mut Unround);
    let lm = Pretrained::new(model, &path).unwrap();
    (dir, lm)
}

fn quantized(config: &LlamaConfig, quantizer: &dyn Quantizer) -> (TempDir, Pretrained) {
    let (dir, mut lm) = pretrained(config);
    for (path, linear) in lm.model.linears_mut() {
        linear.quantize(&path, quantizer, None).unwrap();
    }
    (dir, lm)
}

/// Puts other numbers in the place of a packed weight's.
fn change(linear: &mut Linear, change: impl FnOnce(&mut Parts, Format) -> Format) {
    let Weight::Quant(weight) = linear.weight() else {
        panic!("the weight is dense");
    };
    let mut parts = weight.to_parts();
    let format = change(&mut parts, weight.format());
    let dims = weight.dims();
    let weight = QuantTensor::from_parts(parts, format, dims, &Device::flex()).unwrap();
    let bias = linear
        .bias()
        .map(|bias| Param::from_tensor(bias).set_require_grad(false));
    *linear = Linear::new(Weight::Quant(weight), bias);
}

/// Scales that `f16` holds, and zeros that GPTQ v1 does.
fn round_to_gptq(model: &mut Model) {
    for (_, linear) in model.linears_mut() {
        change(linear, |parts, format| {
            if let Scales::Float(scales) = &mut parts.scales {
                for scale in scales {
                    *scale = half::f16::from_f32(*scale).to_f32();
                }
            }
            if let Some(zeros) = &mut parts.zeros {
                zeros.iter_mut().for_each(|zero| *zero = zero.max(1.0));
            }
            format
        });
    }
}

/// The inputs backwards, in pairs.
fn reorder(model: &mut Model) {
    for (_, linear) in model.linears_mut() {
        let [d_in, _] = linear.weight().dims();
        change(linear, |parts, format| {
            parts.input_order = Some((0..d_in as u32).rev().map(|input| input ^ 1).collect());
            format
        });
    }
}

fn reads_back(dir: &TempDir, lm: &Pretrained, format: CheckpointFormat) -> Pretrained {
    let path = dir.path().join(format.to_string());
    save_as(lm, &path, format).unwrap();
    let again = load(&path, &Device::flex()).unwrap();
    let (found, expected) = (parts(&again.model), parts(&lm.model));
    for ((path, found), (_, expected)) in found.iter().zip(&expected) {
        assert_eq!(
            found.as_ref().map(|(format, _)| format),
            expected.as_ref().map(|(format, _)| format)
        );
        assert!(found == expected, "{path} differs");
    }
    assert_eq!(Fingerprint::of(&again.model), Fingerprint::of(&lm.model));
    again
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A model is the same through version 1, version 2 and the exact format, in any order.
    #[test]
    fn gptq_gives_the_model_back(
        bits in prop::sample::select(vec![2, 3, 4, 8]),
        group_size in prop::sample::select(vec![None, Some(8), Some(32)]),
        symmetric in any::<bool>(),
        ordered in any::<bool>(),
    ) {
        let rtn = Rtn::new().with_bits(bits).with_group_size(group_size).with_symmetric(symmetric);
        let (dir, mut lm) = quantized(&config(32, 64), &rtn);
        round_to_gptq(&mut lm.model);
        if ordered && group_size.is_some() {
            // Sorting by group keeps the inputs of a group in their order.
            for (_, linear) in lm.model.linears_mut() {
                let [d_in, _] = linear.weight().dims();
                let n_groups = d_in.div_ceil(group_size.unwrap());
                change(linear, |parts, format| {
                    let mut order: Vec<u32> = (0..d_in as u32).collect();
                    order.sort_by_key(|input| *input as usize % n_groups);
                    parts.input_order = Some(order).filter(|order| !order.is_sorted());
                    format
                });
            }
        }
        let lm = reads_back(&dir, &lm, Gptq(V1));
        let v1 = tensors(&dir.path().join("GPTQ v1"));
        let lm = reads_back(&dir, &lm, Gptq(V2));
        let lm = reads_back(&dir, &lm, QuantCore);
        save_as(&lm, dir.path().join("again"), Gptq(V1)).unwrap();
        prop_assert!(v1 == tensors(&dir.path().join("again")));
    }

    /// So it is through bitsandbytes' format, with rows that blocks straddle and without.
    #[test]
    fn bitsandbytes_gives_the_model_back(
        inner in prop::sample::select(vec![32, 96, 160, 33, 7]),
        block in prop::sample::select(vec![32, 64, 128]),
        double in any::<bool>(),
        float in any::<bool>(),
    ) {
        // As bitsandbytes quantizes: flattened, whatever the rows.
        let (dir, mut lm) = pretrained(&config(32, inner));
        let grid = if float { Grid::Float4 } else { Grid::NormalFloat };
        for (_, linear) in lm.model.linears_mut() {
            let dims @ [d_in, d_out] = linear.weight().dims();
            let group = (1..=block).rev().find(|g| block % g == 0 && d_in % g == 0).unwrap();
            let repeated = block / group;
            let n_groups = d_in / group;
            let format = Format::new(4, Some(group), grid).unwrap();
            let layout = format.layout(dims).unwrap();
            let n_words = layout.words_shape().iter().product();
            let plain = QuantTensor::from_parts(
                Parts::new(vec![0; n_words], vec![0.0; n_groups * d_out], None),
                format,
                dims,
                &Device::flex(),
            );
            let bias = linear.bias().map(|b| Param::from_tensor(b).set_require_grad(false));
            *linear = Linear::new(Weight::Quant(plain.unwrap()), bias);
            change(linear, |parts, format| {
                let columns = (0..layout.word_rows() * d_out).map(|k| match layout.word_rows() {
                    // Past the last input there are zero codes.
                    n if k / d_out + 1 == n && d_in % 8 > 0 => {
                        (k as u32).wrapping_mul(0x9E37_79B9) & ((1 << (4 * (d_in % 8))) - 1)
                    }
                    _ => (k as u32).wrapping_mul(0x9E37_79B9),
                });
                let columns: Vec<u32> = columns.collect();
                let of_block = |k: usize| (k / repeated * 37 % 101) as u8;
                let mut scales = vec![0.0; n_groups * d_out];
                for (k, scale) in (0..d_out * n_groups).map(|k| (k, f32::from(of_block(k)) / 7.0)) {
                    scales[k % n_groups * d_out + k / n_groups] = scale;
                }
                *parts = Parts::from_columns(&columns, &layout, scales, None).unwrap();
                if !double {
                    return format;
                }
                let double = DoubleQuant { block_size: 256 * repeated, ..DoubleQuant::dynamic() };
                let n_blocks = (d_out * n_groups).div_ceil(double.block_size);
                parts.scales = Scales::Double(quant_core::DoubleScales {
                    codes: (0..d_out * n_groups).map(of_block).collect(),
                    absmax: (0..n_blocks).map(|k| 1.0 + k as f32 / 3.0).collect(),
                    offset: 0.1,
                });
                format.with_double_quant(double).unwrap()
            });
        }
        let lm = reads_back(&dir, &lm, Bitsandbytes);
        let once = tensors(&dir.path().join("bitsandbytes"));
        let lm = reads_back(&dir, &lm, QuantCore);
        save_as(&lm, dir.path().join("again"), Bitsandbytes).unwrap();
        prop_assert!(once == tensors(&dir.path().join("again")));
        let name = "model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__";
        let state = &once[&format!("{name}{}", if float { "fp4" } else { "nf4" })];
        let state: Value = serde_json::from_slice(&state.2).unwrap();
        prop_assert_eq!(&state["blocksize"], &json!(block));
    }
}

#[test]
fn the_exact_format_holds_every_layer() {
    let double = NormalFloat::new()
        .with_block_size(8)
        .with_double_quant(DoubleQuant::dynamic());
    let (dir, mut lm) = quantized(&config(24, 20), &double);
    reorder(&mut lm.model);
    let again = reads_back(&dir, &lm, QuantCore);
    let ids = Tensor::from_data(TensorData::from([[3i32, 1, 4, 1, 5]]), &Device::flex());
    let bits = |lm: &Pretrained| -> Vec<u32> {
        let logits = values(lm.model.forward(ids.clone())).into_iter();
        logits.map(f32::to_bits).collect()
    };
    assert_eq!(bits(&again), bits(&lm));

    let layers = |name: &str| {
        let tensors = tensors(&dir.path().join("quant-core"));
        let name = format!("model.layers.0.mlp.up_proj.{name}");
        tensors
            .get(&name)
            .map(|(dtype, shape, _)| (*dtype, shape.clone()))
    };
    assert_eq!(layers("scale_codes"), Some((Dtype::U8, vec![20, 3])));
    assert_eq!(layers("scale_absmax").unwrap().1, [1]);
    assert_eq!(layers("scale_offset").unwrap().1, [1]);
    assert_eq!(layers("input_order"), Some((Dtype::I32, vec![24])));
    assert_eq!(layers("scales"), None);

    // An order that takes an input twice.
    let path = dir.path().join("quant-core");
    let mut damaged = tensors(&path);
    let name = "model.layers.0.mlp.up_proj.input_order";
    damaged.get_mut(name).unwrap().2[..4].copy_from_slice(&0u32.to_le_bytes());
    write(&path, &damaged);
    let error = load(&path, &Device::flex()).unwrap_err();
    assert_says(&error, &["model.layers.0.mlp.up_proj"]);
}

/// The message of a golden directory after a change to its files.
fn refusal(name: &str, change: impl FnOnce(&mut Value, &mut Tensors)) -> Error {
    let dir = copy(&golden(name));
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let mut all = tensors(dir.path());
    change(&mut config, &mut all);
    fs::write(&path, config.to_string()).unwrap();
    write(dir.path(), &all);
    if name == GPTQ {
        // One configuration, unless the change is to both.
        fs::remove_file(dir.path().join("quantize_config.json")).unwrap();
    }
    load(dir.path(), &Device::flex()).unwrap_err()
}

const LAYER: &str = "model.layers.0.mlp.down_proj";

/// Puts a 32-bit integer into a tensor of the layer.
fn put(all: &mut Tensors, part: &str, at: usize, value: u32) {
    let bytes = &mut all.get_mut(&format!("{LAYER}.{part}")).unwrap().2;
    bytes[4 * at..][..4].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn gptq_checkpoints_that_cannot_be_read_right_are_refused() {
    let config = |setting: &'static str, value: Value| {
        refusal(GPTQ, |config, _| {
            config["quantization_config"][setting] = value
        })
    };
    let error = refusal(GPTQ, |config, _| {
        let settings = config["quantization_config"].as_object_mut().unwrap();
        settings.remove("checkpoint_format");
        settings.remove("format");
    });
    assert!(
        matches!(
            error,
            Error::Checkpoint(models::CheckpointError::GptqVersion { .. })
        ),
        "{error}"
    );
    assert_says(
        &error,
        &["config.json", "\"checkpoint_format\": \"gptq_v2\""],
    );
    assert_says(
        config("checkpoint_format", json!("marlin")),
        &["`marlin`", "gptq_v2"],
    );
    assert_says(config("format", json!("gptq_p")), &["format is `gptq_p`"]);
    assert_says(config("format", json!("gptq_v2")), &["unlike"]);
    assert_says(config("bits", json!(5)), &["bits is 5"]);
    assert_says(config("bits", json!("4")), &["cannot be read"]);
    assert_says(config("bits", Value::Null), &["bits is missing"]);
    assert_says(config("group_size", json!(0)), &["group_size is 0"]);
    assert_says(config("group_size", json!(-2)), &["group_size is -2"]);
    assert_says(config("group_size", json!(64)), &["scales", "[1, 64]"]);
    assert_says(
        config("group_size", json!(128)),
        &["layer `model.layers.0.self_attn.q_proj`"],
    );
    assert_says(config("bits", json!(8)), &["qweight", "[16, 64]"]);
    assert_says(config("pack_dtype", json!("int16")), &["`int16`"]);
    assert_says(
        config("is_marlin_format", json!(true)),
        &["is_marlin_format"],
    );
    assert_says(
        config("quant_method", json!("hqq")),
        &["`hqq`", "gptq, bitsandbytes"],
    );

    let error = refusal(GPTQ, |_, all| put(all, "g_idx", 3, 5));
    assert!(matches!(&error, Error::GroupIndex { .. }), "{error}");
    assert_says(&error, &[LAYER, "input 3 is in group 5, but there are 5"]);
    let error = refusal(GPTQ, |_, all| put(all, "g_idx", 0, u32::MAX));
    assert_says(&error, &["group -1"]);
    let error = refusal(GPTQ, |_, all| put(all, "g_idx", 0, 1));
    assert_says(&error, &["group 0 has 31 inputs, not 32"]);
    let error = refusal(GPTQ, |_, all| {
        let g_idx = all.get_mut(&format!("{LAYER}.g_idx")).unwrap();
        g_idx.1 = vec![159];
        g_idx.2.truncate(4 * 159);
    });
    assert_says(&error, &["g_idx", "[159]", "[160]"]);

    // Inputs in another order, and no word of which.
    let error = refusal(GPTQ, |config, all| {
        config["quantization_config"]["desc_act"] = json!(true);
        all.remove(&format!("{LAYER}.g_idx"));
    });
    let missing = matches!(&error, Error::File(tensor_files::Error::MissingTensor { tensor, .. }) if tensor.ends_with("down_proj.g_idx"));
    assert!(missing, "{error}");
    // Zero-points read in the wrong way are off by one.
    let error = refusal(GPTQ, |config, _| {
        config["quantization_config"]["format"] = json!("gptq_v2");
        config["quantization_config"]["checkpoint_format"] = json!("gptq_v2");
    });
    assert_says(
        &error,
        &["qzeros", "zero-point of 7", "`checkpoint_format`"],
    );

    let wrapped = |quantizer: &str| {
        refusal(GPTQ, |config, all| {
            config["quantization_config"]["meta"]["quantizer"] = json!(quantizer);
            config["quantization_config"]["sym"] = json!(false);
            put(all, "qzeros", 9, 0x7777_77F7);
            // Never reached where the zero-points are read.
            all.remove("model.norm.weight");
        })
    };
    let error = wrapped("auto_gptq:0.7.1");
    assert!(
        matches!(
            &error,
            Error::Checkpoint(models::CheckpointError::WrappedZeros {
                group: 1,
                output: 9,
                ..
            })
        ),
        "{error}"
    );
    assert_says(&error, &["mlp.down_proj.qzeros", "gptq_v2"]);
    assert_says(
        wrapped("gptqmodel:7.7.0"),
        &["no tensor `model.norm.weight`"],
    );

    let error = refusal(GPTQ, |_, all| {
        let head = all["model.layers.0.mlp.up_proj.qweight"].clone();
        all.insert("lm_head.qweight".into(), head);
    });
    assert!(
        matches!(
            &error,
            Error::Checkpoint(models::CheckpointError::PackedHead { .. })
        ),
        "{error}"
    );
    assert_says(&error, &["`lm_head.qweight`", "only projections"]);
    let error = refusal(GPTQ, |_, all| {
        all.remove(&format!("{LAYER}.scales"));
    });
    assert_says(&error, &["no tensor `model.layers.0.mlp.down_proj.scales`"]);
}

#[test]
fn the_two_configurations_of_gptq_must_agree() {
    let with = |change: &dyn Fn(&mut Value, &mut Value)| {
        let dir = copy(&golden(GPTQ));
        let paths = ["config.json", "quantize_config.json"].map(|name| dir.path().join(name));
        let read =
            |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
        let (mut first, mut second) = (read(&paths[0]), read(&paths[1]));
        change(&mut first, &mut second);
        fs::write(&paths[0], first.to_string()).unwrap();
        fs::write(&paths[1], second.to_string()).unwrap();
        load(dir.path(), &Device::flex())
    };
    for (setting, value) in [
        ("bits", json!(8)),
        ("group_size", json!(-1)),
        ("checkpoint_format", json!("gptq_v2")),
    ] {
        let error = with(&|_, second| {
            second.as_object_mut().unwrap().remove("format");
            second[setting] = value.clone();
        });
        let error = error.unwrap_err();
        assert!(
            matches!(
                &error,
                Error::Config(models::ConfigError::Disagreement { .. })
            ),
            "{error}"
        );
        assert_says(&error, &["`quantize_config.json`"].map(|_| setting));
        assert_says(&error, &["/config.json`", "/quantize_config.json`"]);
    }
    let unstated = |config: &mut Value| {
        let settings = config.as_object_mut().unwrap();
        settings.remove("checkpoint_format");
        settings.remove("format");
    };
    // One of them may leave it to the other, or not be there.
    assert!(with(&|first, _| unstated(&mut first["quantization_config"])).is_ok());
    assert!(with(&|_, second| unstated(second)).is_ok());
    let alone = |first: &mut Value, second: &mut Value| {
        first.as_object_mut().unwrap().remove("quantization_config");
        second.as_object_mut().unwrap().remove("quant_method");
    };
    let lm = with(&alone).unwrap();
    assert!(lm.model.linears()[0].1.weight().format().is_some());
    let error = with(&|first, second| {
        alone(first, second);
        unstated(second);
    });
    assert_says(
        error.unwrap_err(),
        &["quantize_config.json", "does not state"],
    );
}

#[test]
fn what_says_nothing_new_is_passed_over() {
    let dir = copy(&golden(GPTQ));
    let mut all = tensors(dir.path());
    all.insert(
        format!("{LAYER}.bias"),
        (Dtype::F16, vec![64], vec![0; 128]),
    );
    all.remove(&format!("{LAYER}.g_idx"));
    write(dir.path(), &all);
    let lm = load(dir.path(), &Device::flex()).unwrap();
    let expected = load(golden(GPTQ), &Device::flex()).unwrap();
    assert_eq!(Fingerprint::of(&lm.model), Fingerprint::of(&expected.model));
    all.get_mut(&format!("{LAYER}.bias")).unwrap().2[1] = 1;
    write(dir.path(), &all);
    let error = load(dir.path(), &Device::flex()).unwrap_err();
    assert_says(&error, &["down_proj.bias", "no place"]);
}

#[test]
fn projections_that_are_dense_stay_so() {
    for (quantizer, format) in [
        (&Rtn::new().with_group_size(8) as &dyn Quantizer, Gptq(V2)),
        (&NormalFloat::new().with_block_size(32), Bitsandbytes),
    ] {
        let (dir, mut lm) = pretrained(&config(32, 64));
        for (path, linear) in lm.model.linears_mut() {
            if !path.ends_with("o_proj") {
                linear.quantize(&path, quantizer, None).unwrap();
            }
        }
        for (path, linear) in lm.model.linears_mut() {
            if !path.ends_with("o_proj") {
                change(linear, |parts, kept| {
                    match &mut parts.scales {
                        Scales::Float(scales) if format == Gptq(V2) => scales.fill(0.125),
                        _ => {}
                    }
                    kept
                });
            }
        }
        reads_back(&dir, &lm, format);
        let config = fs::read_to_string(dir.path().join(format.to_string()).join("config.json"));
        let part = match format {
            Bitsandbytes => "\"model.layers.0.self_attn.o_proj\",\n      \"lm_head\"",
            _ => r#""-:^model\\.layers\\.0\\.self_attn\\.o_proj$": {}"#,
        };
        assert_says(config.unwrap(), &[part]);
    }
}

#[test]
fn bitsandbytes_checkpoints_that_cannot_be_read_right_are_refused() {
    let config = |setting: &'static str, value: Value| {
        refusal(NF4, |config, _| {
            let settings = &mut config["quantization_config"];
            settings[setting] = value.clone();
            settings[format!("_{setting}")] = value;
        })
    };
    assert_says(
        config("load_in_8bit", json!(true)),
        &["load_in_8bit", "4 bits"],
    );
    assert_says(config("load_in_4bit", json!(false)), &["load_in_4bit"]);
    assert_says(
        config("bnb_4bit_quant_storage", json!("bfloat16")),
        &["`bfloat16`", "uint8"],
    );

    let state = |from: &'static str, to: &'static str| {
        refusal(NF4, |_, all| {
            let name = format!("{LAYER}.weight.quant_state.bitsandbytes__nf4");
            let tensor = all.get_mut(&name).unwrap();
            let text = String::from_utf8(tensor.2.clone()).unwrap();
            assert!(text.contains(from), "{from} in {text}");
            tensor.2 = text.replace(from, to).into_bytes();
            tensor.1 = vec![tensor.2.len()];
        })
    };
    assert_says(
        state("\"nf4\"", "\"fp4\""),
        &["bitsandbytes__nf4", "quant_type `fp4`"],
    );
    assert_says(state("64, \"dtype", "0, \"dtype"), &["blocksize 0"]);
    assert_says(state("64, \"dtype", "48, \"dtype"), &["blocksize 48"]);
    assert_says(state("64, \"dtype", "-64, \"dtype"), &["cannot be read"]);
    assert_says(
        state("64, \"dtype", "128, \"dtype"),
        &["absmax", "[160]", "[80]"],
    );
    assert_says(state("[64, 160]", "[160, 64]"), &["[160, 64]", "[64, 160]"]);
    assert_says(state("[64, 160]", "[64, 160, 1]"), &["[64, 160, 1]"]);
    assert_says(state("ize\": 256", "ize\": 0"), &["nested_blocksize 0"]);
    assert_says(
        state("ize\": 256", "ize\": 18446744073709551615"),
        &["nested_blocksize 1844"],
    );
    assert_says(
        state("ize\": 256", "ize\": 32"),
        &["nested_absmax", "[1]", "[5]"],
    );
    assert_says(state("\"nested_blocksize\": 256, ", ""), &["alone"]);
    assert_says(
        state(
            "\"nested_dtype\": \"float32\"",
            "\"nested_dtype\": \"float16\"",
        ),
        &["`float16`"],
    );
    assert_says(state("{", "["), &["cannot be read"]);

    let table = |part: &'static str| {
        refusal(NF4, |_, all| {
            put(all, &format!("weight.{part}"), 3, 0.5f32.to_bits())
        })
    };
    assert_says(
        table("quant_map"),
        &["quant_map", "level 3 is 0.5", "-0.3949"],
    );
    assert_says(
        table("nested_quant_map"),
        &["nested_quant_map", "level 3 is 0.5"],
    );
    let error = refusal(NF4, |_, all| {
        let weight = all.get_mut(&format!("{LAYER}.weight")).unwrap();
        weight.1 = vec![5119, 1];
        weight.2.pop();
    });
    assert_says(&error, &["[5119, 1]", "[5120, 1]"]);
    let error = refusal(NF4, |_, all| {
        let head = all[&format!("{LAYER}.weight.quant_state.bitsandbytes__nf4")].clone();
        let name = "lm_head.weight.quant_state.bitsandbytes__nf4";
        all.insert(name.into(), head);
    });
    assert!(
        matches!(
            &error,
            Error::Checkpoint(models::CheckpointError::PackedHead { .. })
        ),
        "{error}"
    );
}

/// Why a format does not hold a model, layer by layer.
fn cannot_hold(lm: &Pretrained, format: CheckpointFormat) -> (Vec<(String, String)>, String) {
    let dir = tempfile::tempdir().unwrap();
    let error = save_as(lm, dir.path().join("out"), format).unwrap_err();
    assert!(!dir.path().join("out").exists());
    let message = error.to_string();
    let Error::Checkpoint(models::CheckpointError::CannotHold {
        layers, instead, ..
    }) = error
    else {
        panic!("{error}");
    };
    for (path, reason) in &layers {
        assert_says(&message, &[path, reason, &instead.to_string()]);
    }
    (layers, instead.to_string())
}

#[test]
fn models_that_gptq_does_not_hold_are_refused() {
    let rtn = Rtn::new().with_group_size(8);
    let refused = |make: &dyn Fn(&mut Model), version| {
        let (_dir, mut lm) = quantized(&config(32, 64), &rtn);
        round_to_gptq(&mut lm.model);
        make(&mut lm.model);
        cannot_hold(&lm, Gptq(version))
    };
    // Changes the zeros of two layers.
    let zeros = |value: f32| {
        move |model: &mut Model| {
            for (path, linear) in model.linears_mut() {
                if path.ends_with("k_proj") || path.ends_with("up_proj") {
                    change(linear, |parts, format| {
                        parts.zeros.as_mut().unwrap()[..3].fill(value);
                        format
                    });
                }
            }
        }
    };
    let paths = [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.up_proj",
    ];
    let check = |(layers, instead): (Vec<(String, String)>, String), reason: &str, other: &str| {
        let found: Vec<&str> = layers.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(found, paths);
        for (_, found) in &layers {
            assert_says(found, &[reason]);
        }
        assert_eq!(instead, other);
    };
    check(
        refused(&zeros(0.0), V1),
        "3 zeros of 0, which v1",
        "GPTQ v2",
    );
    check(
        refused(&zeros(1.5), V2),
        "3 zeros that are not whole",
        "quant-core",
    );
    check(
        refused(&zeros(16.0), V2),
        "3 zeros outside of 0 to 15",
        "quant-core",
    );
    check(
        refused(&zeros(-1.0), V1),
        "3 zeros outside of 0 to 15",
        "quant-core",
    );

    // The zero-points of weights that are nowhere negative.
    let (dir, mut lm) = quantized(&config(32, 64), &rtn);
    for (path, linear) in lm.model.linears_mut() {
        let [d_in, d_out] = linear.weight().dims();
        let weight = Tensor::<1, Int>::arange(0..(d_in * d_out) as i64, &Device::flex());
        let weight = weight.float().sin().abs().reshape([d_in, d_out]);
        *linear = Linear::new(Weight::frozen(weight), None);
        linear.quantize(&path, &rtn, None).unwrap();
        change(linear, |parts, format| {
            if let Scales::Float(scales) = &mut parts.scales {
                scales.fill(0.125);
            }
            format
        });
    }
    save_as(&lm, dir.path().join("positive"), Gptq(V2)).unwrap();
    let (layers, instead) = cannot_hold(&lm, Gptq(V1));
    assert_eq!((layers.len(), instead.as_str()), (7, "GPTQ v2"));

    let (_dir, lm) = quantized(&config(32, 64), &rtn);
    let (layers, instead) = cannot_hold(&lm, Gptq(V2));
    assert_eq!((layers.len(), instead.as_str()), (7, "quant-core"));
    assert_says(
        &layers[0].1,
        &["scales of 128 that f16 does not hold exactly"],
    );

    let (_dir, mut lm) = quantized(&config(32, 68), &rtn);
    round_to_gptq(&mut lm.model);
    let (layers, _) = cannot_hold(&lm, Gptq(V2));
    let reasons: BTreeMap<&str, &str> = layers
        .iter()
        .map(|(path, reason)| (path.rsplit('.').next().unwrap(), reason.as_str()))
        .collect();
    assert_eq!(
        reasons.keys().copied().collect::<Vec<_>>(),
        ["down_proj", "gate_proj", "up_proj"]
    );
    assert_says(
        reasons["down_proj"],
        &["short last group: 68 inputs in groups of 8"],
    );
    assert_says(reasons["down_proj"], &["68 inputs of 4 bits"]);
    assert_says(reasons["up_proj"], &["68 outputs of 4 bits"]);

    let (_dir, lm) = quantized(&config(32, 64), &NormalFloat::new().with_block_size(32));
    let (layers, instead) = cannot_hold(&lm, Gptq(V1));
    assert_eq!((layers.len(), instead.as_str()), (7, "bitsandbytes"));
    assert_says(&layers[0].1, &["4-bit normal float", "uniform"]);

    let (_dir, mut lm) = pretrained(&config(32, 64));
    for (path, linear) in lm.model.linears_mut() {
        let bits = if path.ends_with("v_proj") { 8 } else { 4 };
        linear.quantize(&path, &rtn.with_bits(bits), None).unwrap();
    }
    round_to_gptq(&mut lm.model);
    let (layers, _) = cannot_hold(&lm, Gptq(V2));
    assert_eq!(layers.len(), 1);
    assert_says(&layers[0].0, &["v_proj"]);
    assert_says(&layers[0].1, &["8-bit affine", "4-bit affine", "q_proj"]);
}

/// Whose projections each of the formats holds.
#[test]
fn heads_are_packed_in_the_exact_format_alone() {
    let rtn = Rtn::new().with_group_size(8);
    let nf4 = NormalFloat::new().with_block_size(32);
    let cases: [(CheckpointFormat, &dyn Quantizer, &str); 3] = [
        (Gptq(V1), &rtn, "4-bit affine"),
        (Gptq(V2), &rtn, "4-bit affine"),
        (Bitsandbytes, &nf4, "4-bit normal float"),
    ];
    for (format, quantizer, name) in cases {
        for tied in [true, false] {
            let mut config = config(32, 64);
            config.tie_word_embeddings = tied;
            let (dir, mut lm) = quantized(&config, quantizer);
            if format != Bitsandbytes {
                round_to_gptq(&mut lm.model);
            }
            reads_back(&dir, &lm, format);
            models::quantize_head(&mut lm.model, quantizer).unwrap();
            let (layers, instead) = cannot_hold(&lm, format);
            let [(path, reason)] = &layers[..] else {
                panic!("{layers:?}");
            };
            assert_eq!((path.as_str(), instead.as_str()), ("lm_head", "quant-core"));
            assert_says(reason, &[name, "only projections"]);
            reads_back(&dir, &lm, QuantCore);
        }
    }
}

#[test]
fn models_that_bitsandbytes_does_not_hold_are_refused() {
    let refused = |quantizer: &dyn Quantizer, make: &dyn Fn(&mut Model)| {
        let (_dir, mut lm) = pretrained(&config(32, 64));
        for (path, linear) in lm.model.linears_mut() {
            linear.quantize(&path, quantizer, None).unwrap();
        }
        make(&mut lm.model);
        cannot_hold(&lm, Bitsandbytes)
    };
    let unchanged = |_: &mut Model| ();
    let (layers, instead) = refused(&Rtn::new().with_group_size(8), &unchanged);
    assert_eq!((layers.len(), instead.as_str()), (7, "quant-core"));
    assert_says(&layers[0].1, &["4-bit affine", "NF4 and FP4"]);
    let (_, instead) = refused(&Rtn::new().with_group_size(8), &round_to_gptq);
    assert_eq!(instead, "GPTQ v2");
    let nf4 = NormalFloat::new();
    let (layers, _) = refused(&nf4.with_bits(3).with_block_size(32), &unchanged);
    assert_says(&layers[0].1, &["3-bit normal float"]);
    let (layers, _) = refused(&nf4.with_block_size(8), &unchanged);
    assert_says(&layers[0].1, &["groups of 8 among 32 inputs"]);
    let (layers, instead) = refused(&nf4.with_block_size(32), &reorder);
    assert_says(&layers[0].1, &["another order"]);
    assert_eq!(instead, "quant-core");
    let unsigned = DoubleQuant {
        levels: ScaleLevels::Unsigned { bits: 8 },
        block_size: 256,
    };
    let (layers, _) = refused(
        &nf4.with_block_size(32).with_double_quant(unsigned),
        &unchanged,
    );
    assert_says(&layers[0].1, &["dynamic map"]);
    let smaller = DoubleQuant {
        block_size: 64,
        ..DoubleQuant::dynamic()
    };
    let (layers, _) = refused(
        &nf4.with_block_size(32).with_double_quant(smaller),
        &unchanged,
    );
    assert_says(&layers[0].1, &["blocks of 64", "256 scales"]);
}

/// Other writers have scales in `bf16` and `f32`.
#[test]
fn scales_of_gptq_may_have_any_type_of_float() {
    let dir = copy(&golden(GPTQ));
    let mut file = TensorFile::open(&dir.path().join("model.safetensors")).unwrap();
    let name = format!("{LAYER}.scales");
    let (scales, shape) = file.floats::<2>(&name).unwrap();
    let out = tempfile::tempdir().unwrap();
    write_tensors(
        &out.path().join("model.safetensors"),
        [(
            name.clone(),
            LazyTensor::floats_as(FloatType::F32, shape, move || scales.clone()),
        )],
    )
    .unwrap();
    let mut all = tensors(dir.path());
    all.append(&mut tensors(out.path()));
    assert_eq!(all[&name].0, Dtype::F32);
    write(dir.path(), &all);
    let lm = load(dir.path(), &Device::flex()).unwrap();
    let expected = load(golden(GPTQ), &Device::flex()).unwrap();
    assert_eq!(Fingerprint::of(&lm.model), Fingerprint::of(&expected.model));
}
