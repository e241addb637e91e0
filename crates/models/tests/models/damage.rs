//! Saved models of which one file is damaged.

use std::fs;
use std::path::PathBuf;

use burn::tensor::Device;
use models::{Error, Pretrained, load, save};
use quant_core::Rtn;
use tempfile::TempDir;

use super::fixtures::*;

/// A saved quantized model of which one file is changed.
pub(crate) struct Damage {
    pub(crate) dir: TempDir,
    pub(crate) path: PathBuf,
}

impl Damage {
    pub(crate) fn new() -> Self {
        let (dir, mut lm) = pretrained(llama(), 1);
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

/// Each number is finite, and the weights would not be.
#[test]
fn scales_whose_weights_are_infinite_are_refused() {
    let damage = Damage::new();
    let weights = damage.path.join("model.safetensors");
    let mut all = read_tensors(&weights);
    let name = "model.layers.1.mlp.up_proj.scales";
    let (dtype, shape, bytes) = all.get_mut(name).unwrap();
    let n = shape.iter().product::<usize>();
    *dtype = safetensors::Dtype::F32;
    let scales = (0..n).map(|at| if at == n - 1 { 3e38f32 } else { 0.5 });
    *bytes = scales.flat_map(f32::to_le_bytes).collect();
    let last = [shape[0] - 1, shape[1] - 1];
    write_tensors(&weights, &all);
    let error = damage.error();
    let Error::Peft(peft::Error::Quant { path, source }) = &error else {
        panic!("{error:?}");
    };
    let quant_core::Error::Overflow { group, column, .. } = *source else {
        panic!("{source:?}");
    };
    assert_eq!(path, "model.layers.1.mlp.up_proj");
    assert_eq!([group, column], last);
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
        &["vocab_size is -1"],
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
        &["rope_scaling.short_factor is missing"],
    );
    says(
        "\"rope_scaling\": null",
        "\"rope_scaling\": {\"type\": \"linear\"}",
        &["rope_scaling.factor is missing"],
    );
    says(
        "\"hidden_act\": \"silu\"",
        "\"hidden_act\": \"mish\"",
        &["`mish`"],
    );
    says(
        "\"quant_method\": \"quant-core\"",
        "\"quant_method\": \"awq\"",
        &["`awq`"],
    );
    let both = "\"rope_scaling\": {\"type\": \"linear\", \"rope_type\": \"linear\"}";
    says(
        "\"rope_scaling\": null",
        both,
        &["rope_scaling.factor is missing"],
    );
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
    let (dir, lm) = pretrained(llama(), 1);
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
    assert!(matches!(
        damage.error(),
        Error::Checkpoint(models::CheckpointError::NoWeights { .. })
    ));
    fs::write(damage.path.join("pytorch_model.bin"), "x").unwrap();
    assert_says(damage.error().to_string(), &["convert it"]);
    fs::write(damage.path.join("tokenizer.json"), "{}").unwrap();
    assert!(matches!(
        damage.error(),
        Error::Text(models::TextError::Tokenizer { .. })
    ));
    fs::remove_file(damage.path.join("config.json")).unwrap();
    assert!(matches!(
        damage.error(),
        Error::File(tensor_files::Error::Io { .. })
    ));
}

/// A dense golden directory cut into two shards.
fn sharded(change: impl Fn(&mut String)) -> (TempDir, Result<Pretrained, Error>) {
    let dir = tempfile::tempdir().unwrap();
    let golden = golden("llama_bf16");
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
    assert!(
        matches!(&error, Error::Checkpoint(models::CheckpointError::MissingShard { shard, .. }) if shard == "two.safetensors")
    );
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
