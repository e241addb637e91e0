//! LoRA, rsLoRA, DoRA and trained biases against PEFT (`tests/golden/README.md`).

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, Gradients, Int, Tensor};
use models::{Config, Model, Pretrained};
use peft::{
    Adapter, Adapters, Batch, CausalLm, Error, FitConfig, Linears, Lora, Method, OffGrid, Peqa,
    Schedule, Tile, fit, token_nll,
};
use quant_core::Rtn;
use tensor_files::{FloatType, LazyTensor, TensorFile};

use super::fixtures::{golden, reference_tokens, values};

pub(crate) const CASES: [&str; 3] = ["lora_llama_all", "lora_llama_rslora", OPT];
/// On some projections of an OPT, its MLP's among them.
const OPT: &str = "lora_opt_qv";
/// DoRA, with patterns of ranks and alphas.
const DORA: &str = "lora_llama_dora";
/// With trained biases, over a base that has some.
const BIAS: &str = "lora_llama_bias";

/// The base of most cases.
pub(crate) fn base() -> Pretrained {
    base_of(DORA)
}

fn base_of(case: &str) -> Pretrained {
    let dir = match case {
        BIAS | OPT => golden(case).join("base"),
        _ => golden("llama_gqa"),
    };
    models::load(dir, &Device::flex()).unwrap()
}

fn reference_of(case: &str) -> TensorFile {
    TensorFile::open(&golden(case).join("reference.safetensors")).unwrap()
}

fn expected<const D: usize>(case: &str, name: &str) -> Vec<f32> {
    reference_of(case).floats::<D>(name).unwrap().0
}

pub(crate) fn tokens(case: &str) -> Tensor<2, Int> {
    reference_tokens(&golden(case).join("reference.safetensors"))
}

pub(crate) fn logits(model: &Model, tokens: Tensor<2, Int>) -> Vec<f32> {
    values(model.forward(tokens))
}

pub(crate) fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().all(|value| value.is_finite()));
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

/// The trained tensors, or their gradients, under PEFT's names: factors `[out, in]`, norms `[out]`.
fn trained(model: &Model, gradients: Option<&Gradients>) -> BTreeMap<String, Vec<f32>> {
    fn of<const D: usize>(tensor: Tensor<D>, gradients: Option<&Gradients>) -> Tensor<D> {
        match gradients {
            Some(gradients) => tensor.grad(gradients).unwrap(),
            None => tensor,
        }
    }
    let mut all = BTreeMap::new();
    for (path, linear) in model.linears() {
        let Some(Adapter::Lora(lora)) = linear.adapter() else {
            continue;
        };
        let mut insert = |name: &str, values: Vec<f32>| {
            let name = format!("base_model.model.{path}.{name}.default.weight");
            all.insert(name, values);
        };
        insert("lora_A", values(of(lora.a(), gradients).transpose()));
        insert("lora_B", values(of(lora.b(), gradients).transpose()));
        if let Some(magnitude) = lora.magnitude() {
            insert("lora_magnitude_vector", values(of(magnitude, gradients)));
        }
        if let Some(bias) = linear.adapter().and_then(Adapter::bias) {
            let name = format!("base_model.model.{path}.base_layer.bias");
            all.insert(name, values(of(bias, gradients)));
        }
    }
    all
}

/// A tensor of the reference, which has a dimension or two.
fn expected_flat(case: &str, name: &str) -> Vec<f32> {
    match reference_of(case).shape(name).map(<[usize]>::len) {
        Some(1) => expected::<1>(case, name),
        _ => expected::<2>(case, name),
    }
}

#[test]
fn loras_of_peft_are_loaded_disabled_and_merged() {
    for case in CASES {
        let mut model = base_of(case).model;
        let tokens = tokens(case);
        let adapters = Adapters::load_hf(golden(case), &model).unwrap();
        let none = peft::activate(&mut model, &adapters).unwrap();
        let adapted = logits(&model, tokens.clone());
        assert!(
            difference(&adapted, &expected::<3>(case, "logits")) < 1e-4,
            "{case}"
        );
        let before = peft::activate(&mut model, &none).unwrap();
        let disabled = logits(&model, tokens.clone());
        for name in ["base_logits", "disabled_logits"] {
            assert!(
                difference(&disabled, &expected::<3>(case, name)) < 1e-4,
                "{case}"
            );
        }
        assert!(
            difference(&adapted, &disabled) > 1e-2,
            "{case}: the adapter does nothing"
        );

        peft::activate(&mut model, &before).unwrap();
        let probe = Batch::new(tokens.clone()).unwrap();
        let certificate = peft::merge_probed(&mut model, OffGrid::Refuse, &probe).unwrap();
        let merged = logits(&model, tokens);
        assert!(
            difference(&merged, &expected::<3>(case, "merged_logits")) < 1e-4,
            "{case}"
        );
        assert!((certificate.probe.unwrap().retention - 1.0).abs() < 1e-4);
        for (path, linear) in model.linears() {
            let name = format!("merged.{path}.weight");
            if reference_of(case).contains(&name) {
                let merged = values(linear.weight().to_dense().transpose());
                assert!(
                    difference(&merged, &expected::<2>(case, &name)) < 1e-6,
                    "{name}"
                );
            }
        }
    }
}

/// DoRA, with ranks and alphas that patterns give; written again, with each layer's own.
#[test]
fn dora_of_peft_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = base().model;
    let adapters = Adapters::load_hf(golden(DORA), &model).unwrap();
    let again = dir.path().join("again");
    adapters.save_hf(&again, &model).unwrap();
    for adapters in [&adapters, &Adapters::load_hf(&again, &model).unwrap()] {
        peft::activate(&mut model, adapters).unwrap();
        let found = logits(&model, tokens(DORA));
        assert!(difference(&found, &expected::<3>(DORA, "logits")) < 1e-4);
    }
    let ranks = adapters.layers().map(|(path, adapter)| match adapter {
        Adapter::Lora(lora) => (path, lora.rank(), lora.alpha()),
        _ => panic!("`{path}` has no LoRA"),
    });
    let expected = [
        ("model.layers.0.mlp.down_proj", 4, 8.0),
        ("model.layers.0.self_attn.q_proj", 4, 3.0),
        ("model.layers.0.self_attn.v_proj", 2, 8.0),
        ("model.layers.1.mlp.down_proj", 6, 8.0),
        ("model.layers.1.self_attn.q_proj", 4, 8.0),
        ("model.layers.1.self_attn.v_proj", 2, 8.0),
    ];
    assert_eq!(ranks.collect::<Vec<_>>(), expected);
}

/// Biases that are trained beside LoRA and replace those of the layers.
#[test]
fn trained_biases_of_peft_are_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = base_of(BIAS).model;
    let disabled = logits(&model, tokens(BIAS));
    let adapters = Adapters::load_hf(golden(BIAS), &model).unwrap();
    let with_bias = adapters
        .layers()
        .filter(|(_, adapter)| adapter.bias().is_some());
    let with_bias: Vec<&str> = with_bias.map(|(path, _)| path).collect();
    assert_eq!(with_bias.len(), 4);
    assert!(with_bias.iter().all(|path| path.contains("self_attn")));
    let ours = dir.path().join("ours");
    adapters.save(&ours).unwrap();
    let peft = dir.path().join("peft");
    adapters.save_hf(&peft, &model).unwrap();
    let mut read = TensorFile::open(&peft.join("adapter_model.safetensors")).unwrap();
    let mut expected_file =
        TensorFile::open(&golden(BIAS).join("adapter_model.safetensors")).unwrap();
    assert_eq!(read.names(), expected_file.names());
    for name in read.names().iter().filter(|name| name.ends_with(".bias")) {
        assert_eq!(
            read.floats::<1>(name).unwrap(),
            expected_file.floats::<1>(name).unwrap()
        );
    }
    let reloaded = [
        Adapters::load(&ours, &Device::flex()).unwrap(),
        Adapters::load_hf(&peft, &model).unwrap(),
    ];
    for adapters in [adapters].iter().chain(&reloaded) {
        let none = peft::activate(&mut model, adapters).unwrap();
        let found = logits(&model, tokens(BIAS));
        assert!(difference(&found, &expected::<3>(BIAS, "logits")) < 1e-4);
        peft::activate(&mut model, &none).unwrap();
        assert_eq!(logits(&model, tokens(BIAS)), disabled);
    }
    // A layer without a bias takes none.
    let Config::Llama(config) = model.config() else {
        panic!("a LLaMA");
    };
    let config = config
        .clone()
        .with_attention_bias(false)
        .with_attention_output_bias(false);
    let without = Model::init(config, 0, &Device::flex());
    let error = Adapters::load_hf(golden(BIAS), &without).unwrap_err();
    let named = matches!(&error, Error::NoBias { path } if path.contains("self_attn"));
    assert!(named, "{error}");

    peft::attach(&mut model, &Lora::new(1).with_bias(true)).unwrap();
    let attached = Adapters::of(&model).unwrap();
    for (path, adapter) in attached.layers() {
        assert_eq!(
            adapter.bias().is_some(),
            path.contains("self_attn"),
            "{path}"
        );
    }
}

/// Settings that are not supported are named.
#[test]
fn settings_of_peft_that_are_not_supported_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = base().model;
    let mut n = 0;
    let mut load = |edit: &dyn Fn(&mut serde_json::Value)| {
        n += 1;
        let path = dir.path().join(format!("{n}"));
        std::fs::create_dir(&path).unwrap();
        let mut config: serde_json::Value =
            tensor_files::read_json(&golden(CASES[0]).join("adapter_config.json")).unwrap();
        edit(&mut config);
        tensor_files::write_json(&path.join("adapter_config.json"), &config).unwrap();
        let tensors = "adapter_model.safetensors";
        std::fs::copy(golden(CASES[0]).join(tensors), path.join(tensors)).unwrap();
        Adapters::load_hf(&path, &model)
    };
    assert!(load(&|_| ()).is_ok());
    for (key, value) in [
        ("peft_type", "\"IA3\""),
        ("target_parameters", "[\"mlp.experts\"]"),
        ("trainable_token_indices", "[1, 2]"),
        ("init_lora_weights", "\"pissa\""),
        ("bias", "\"some\""),
        ("lora_bias", "true"),
        ("use_bdlora", "{\"nblocks\": 2}"),
        ("layer_replication", "[[0, 2]]"),
        ("a_flag_of_tomorrow", "true"),
    ] {
        let value: serde_json::Value = serde_json::from_str(value).unwrap();
        let error = load(&|config| config[key] = value.clone()).unwrap_err();
        assert!(
            matches!(error, Error::File(tensor_files::Error::File { .. })),
            "{error}"
        );
        assert!(error.to_string().contains(key), "{error}");
    }
    // An unknown flag that is off.
    assert!(load(&|config| config["a_flag_of_tomorrow"] = false.into()).is_ok());

    let rank = load(&|config| config["r"] = 4.into()).unwrap_err();
    assert!(
        matches!(rank, Error::File(tensor_files::Error::Tensor { .. })),
        "{rank}"
    );
    let rank = load(&|config| config["rank_pattern"] = serde_json::json!({"q_proj": 2}));
    assert!(rank.unwrap_err().to_string().contains("rank 2"));
    let dora = load(&|config| config["use_dora"] = true.into()).unwrap_err();
    assert!(
        matches!(dora, Error::File(tensor_files::Error::MissingTensor { .. })),
        "{dora}"
    );
    for (key, value, part) in [
        ("lora_alpha", serde_json::json!(-1), "alpha is -1"),
        (
            "alpha_pattern",
            serde_json::json!({"q_proj": -1}),
            "q_proj`, alpha is -1",
        ),
        ("lora_dropout", serde_json::json!(1.5), "dropout is 1.5"),
        ("r", serde_json::json!("8"), "`r` is \"8\""),
        (
            "target_modules",
            serde_json::json!(7),
            "`target_modules` is 7",
        ),
        (
            "target_modules",
            serde_json::json!("(?!x"),
            "target_modules: ",
        ),
        (
            "rank_pattern",
            serde_json::json!({"q_proj": "two"}),
            "rank_pattern says \"two\"",
        ),
    ] {
        let error = load(&|config| config[key] = value.clone()).unwrap_err();
        assert!(
            matches!(error, Error::File(tensor_files::Error::File { .. })),
            "{error}"
        );
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
    let both = load(&|config| {
        config["use_dora"] = true.into();
        config["use_qalora"] = true.into();
    });
    assert!(both.unwrap_err().to_string().contains("exclude each other"));
    let empty = load(&|config| {
        config["use_qalora"] = true.into();
        config["qalora_group_size"] = 0.into();
    });
    assert!(
        empty
            .unwrap_err()
            .to_string()
            .contains("qalora_group_size is 0")
    );
    // PEFT takes it for LoRA where the factors are those of LoRA.
    let plain = load(&|config| config["use_qalora"] = true.into()).unwrap();
    assert!(
        plain
            .layers()
            .all(|(_, adapter)| adapter.method() == "LoRA")
    );
    let none = load(&|config| config["peft_type"] = serde_json::Value::Null).unwrap_err();
    assert!(none.to_string().contains("peft_type"), "{none}");
    let saved = load(&|config| config["modules_to_save"] = serde_json::json!(["lm_head"]));
    let named = matches!(saved, Err(Error::File(tensor_files::Error::MissingTensor { tensor, .. })) if tensor.ends_with("lm_head.weight"));
    assert!(named);

    // A target without tensors, and tensors of a layer that the model does not have.
    let partial = |name: &str, keep: &dyn Fn(&str) -> Option<String>| {
        let path = dir.path().join(name);
        std::fs::create_dir(&path).unwrap();
        let config = "adapter_config.json";
        std::fs::copy(golden(CASES[0]).join(config), path.join(config)).unwrap();
        let source = golden(CASES[0]).join("adapter_model.safetensors");
        let mut file = TensorFile::open(&source).unwrap();
        let tensors = file.names().into_iter().filter_map(|old| {
            let name = keep(&old)?;
            let (values, dims) = file.floats::<2>(&old).unwrap();
            Some((
                name,
                LazyTensor::floats_as(FloatType::F32, dims, move || values.clone()),
            ))
        });
        let tensors: Vec<_> = tensors.collect();
        tensor_files::write_tensors(&path.join("adapter_model.safetensors"), tensors).unwrap();
        Adapters::load_hf(&path, &model).unwrap_err()
    };
    let error = partial("missing", &|name| {
        (!name.contains("layers.1.mlp.up_proj")).then(|| name.into())
    });
    let named = matches!(&error, Error::File(tensor_files::Error::MissingTensor { tensor, .. }) if tensor.contains("up_proj"));
    assert!(named, "{error}");
    let error = partial("half", &|name| {
        (!name.contains("layers.1.mlp.up_proj.lora_B")).then(|| name.into())
    });
    let named = matches!(&error, Error::File(tensor_files::Error::MissingTensor { tensor, .. }) if tensor.contains("lora_B"));
    assert!(named, "{error}");
    let error = partial("unknown", &|name| {
        Some(name.replace("layers.1", "layers.9"))
    });
    let named = matches!(&error, Error::UnknownLayer { path } if path.contains("layers.9"));
    assert!(named, "{error}");
    let error = partial("extra", &|name| {
        Some(name.replace("lora_A.weight", "lora_C.weight"))
    });
    let named = matches!(&error, Error::File(tensor_files::Error::Tensor { tensor, .. }) if tensor.contains("lora_C"));
    assert!(named, "{error}");
    let error = partial("shape", &|name| {
        Some(if name.contains("down_proj") {
            name.replace("down_proj", "up_proj")
        } else {
            name.replace("up_proj", "down_proj")
        })
    });
    let named = matches!(&error, Error::Shape { path, .. } if path.contains("_proj"));
    assert!(named, "{error}");

    // And what PEFT has not.
    let mut model = base().model;
    models::quantize(&mut model, &Rtn::new().with_group_size(32), &[], |_| {}).unwrap();
    let methods: [&dyn Method; 4] = [
        &Peqa::new(),
        &Tile::qa_hira(),
        &Tile::q_bara(1),
        &Tile::qa_lora(2),
    ];
    for method in methods {
        let mut model = model.clone();
        peft::attach(&mut model, method).unwrap();
        let adapters = Adapters::of(&model).unwrap();
        let error = adapters
            .save_hf(dir.path().join("none"), &model)
            .unwrap_err();
        assert!(matches!(error, Error::NotForPeft { .. }), "{error}");
    }
}

#[test]
fn loras_train_as_in_peft() {
    for case in [CASES[0], CASES[1], OPT, DORA, BIAS] {
        let mut model = base_of(case).model;
        let adapters = Adapters::load_hf(golden(case), &model).unwrap();
        peft::activate(&mut model, &adapters).unwrap();
        let batch = Batch::new(tokens(case)).unwrap();

        let tracked = model.clone().train();
        let loss = token_nll(&tracked, &batch).mean();
        let expected_loss = reference_of(case).floats::<0>("loss").unwrap().0[0];
        assert!((loss.clone().inner().into_scalar::<f32>() - expected_loss).abs() < 1e-4);
        let gradients = loss.backward();
        let tracked = trained(&tracked, Some(&gradients));
        assert!(!tracked.is_empty());
        for (name, found) in tracked {
            let expected = expected_flat(case, &format!("grad.{name}"));
            let largest = expected.iter().fold(0.0, |most: f32, v| most.max(v.abs()));
            assert!(
                difference(&found, &expected) <= 1e-3 * largest,
                "{case}: {name}"
            );
        }

        let config = FitConfig::new()
            .with_learning_rate(0.01)
            .with_weight_decay(0.01)
            .with_schedule(Schedule::Constant)
            .with_max_grad_norm(None)
            .with_steps(Some(5));
        let mut losses = Vec::new();
        fit(&mut model, &[batch], &config, |step, _| {
            losses.push(step.loss as f32)
        })
        .unwrap();
        let found = difference(&losses, &expected::<1>(case, "train_losses"));
        assert!(found < 1e-4, "{case}: {losses:?}");
        if [DORA, BIAS].contains(&case) {
            let batch = tokens(case);
            let found = logits(&model, batch.clone());
            assert!(difference(&found, &expected::<3>(case, "after5_logits")) < 1e-3);
            peft::merge(&mut model).unwrap();
            let found = logits(&model, batch);
            assert!(difference(&found, &expected::<3>(case, "after5_merged_logits")) < 1e-3);
            continue;
        }
        for (name, found) in trained(&model, None) {
            let expected = expected_flat(case, &format!("after5.{name}"));
            // AdamW moves each value by about 0.01 a step, whatever the size of its gradient.
            assert!(difference(&found, &expected) < 2e-3, "{case}: {name}");
        }
    }
}

#[test]
fn what_is_written_for_peft_is_what_it_wrote() {
    let dir = tempfile::tempdir().unwrap();
    for case in CASES {
        let model = base_of(case).model;
        let adapters = Adapters::load_hf(golden(case), &model).unwrap();
        let path = dir.path().join(case);
        adapters.save_hf(&path, &model).unwrap();
        let read = |dir: &Path| {
            let mut file = TensorFile::open(&dir.join("adapter_model.safetensors")).unwrap();
            let names = file.names();
            let tensors = names
                .into_iter()
                .map(|name| (file.floats::<2>(&name).unwrap(), name));
            tensors.collect::<Vec<_>>()
        };
        assert_eq!(read(&path), read(&golden(case)));
        let config = |dir: &Path| -> serde_json::Value {
            tensor_files::read_json(&dir.join("adapter_config.json")).unwrap()
        };
        assert_eq!(config(&path), config(&golden(case)));
    }
}

/// A sum of LoRAs is the sum of what they add.
#[test]
fn loras_are_combined() {
    let mut model = base().model;
    let of = |case: &str| Adapters::load_hf(golden(case), &model).unwrap();
    let (first, second) = (of(CASES[0]), of(CASES[1]));
    let combined = Adapters::combined(&[(&first, 0.75), (&second, -0.5)]).unwrap();
    let dense = |adapters: &Adapters| {
        let mut model = model.clone();
        peft::activate(&mut model, adapters).unwrap();
        peft::merge(&mut model).unwrap();
        let linears = model.linears().into_iter();
        linears
            .map(|(_, linear)| linear.weight().to_dense())
            .collect::<Vec<_>>()
    };
    let (first, second, sum) = (dense(&first), dense(&second), dense(&combined));
    for (at, (_, linear)) in model.linears().into_iter().enumerate() {
        let base = linear.weight().to_dense();
        let expected = base.clone()
            + (first[at].clone() - base.clone()) * 0.75
            + (second[at].clone() - base) * -0.5;
        assert!(difference(&values(sum[at].clone()), &values(expected)) < 1e-5);
    }
    for (path, adapter) in combined.layers() {
        let Adapter::Lora(lora) = adapter else {
            panic!("`{path}` has no LoRA");
        };
        assert_eq!((lora.rank(), lora.scale()), (16, 1.0));
    }
    peft::activate(&mut model, &combined).unwrap();
}
