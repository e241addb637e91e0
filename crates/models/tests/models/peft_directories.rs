//! Directories of PEFT over a LLaMA and an OPT (`tests/golden/README.md`, `peft`).

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor};
use models::{Model, Pretrained};
use peft::{Adapter, Adapters, CausalLm, Error, Fingerprint, Linears, Lora, Weight};
use quant_core::Rtn;
use serde_json::{Value, json};
use tensor_files::{FloatType, LazyTensor, TensorFile};

use super::adapters::difference;
use super::fixtures::{golden, reference_tokens, values};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// The directories, and whether they have parameters of the base that are not its own.
const CASES: [(&str, bool); 23] = [
    ("look_ahead", false),
    ("look_behind", false),
    ("patterns", false),
    ("all_linear", false),
    ("layers", false),
    ("saved", true),
    ("saved_unchanged", false),
    ("saved_norms", true),
    ("saved_layers", true),
    ("lora_ends", true),
    ("dora_head", true),
    ("tokens", true),
    ("tied_saved_embedding", true),
    ("tied_saved_head", true),
    ("tied_saved", true),
    ("tied_ensured", true),
    ("tied_lora_embedding", true),
    ("tied_lora_head", true),
    ("tied_lora_ensured", true),
    ("tied_tokens", true),
    ("opt_all_linear", true),
    ("opt_bias_all", true),
    ("opt_bias_lora_only", false),
];

fn case_dir(case: &str) -> PathBuf {
    golden("peft").join(case)
}

fn base_of(case: &str) -> Pretrained {
    let config: Value = tensor_files::read_json(&case_dir(case).join(CONFIG)).unwrap();
    let base = config["base_model_name_or_path"].as_str().unwrap();
    models::load(golden("peft").join(base), &Device::flex()).unwrap()
}

fn tokens() -> Tensor<2, Int> {
    reference_tokens(&golden("peft").join("logits.safetensors"))
}

fn expected(case: &str) -> Vec<f32> {
    let mut file = TensorFile::open(&golden("peft").join("logits.safetensors")).unwrap();
    file.floats::<3>(case).unwrap().0
}

fn logits(model: &Model) -> Vec<f32> {
    values(model.forward(tokens()))
}

/// The model with the adapters of a directory.
fn adapted(case: &str, dir: &Path) -> Model {
    let mut model = base_of(case).model;
    let adapters = Adapters::open_with_base(dir, &mut model).unwrap();
    peft::activate(&mut model, &adapters).unwrap();
    model
}

#[test]
fn directories_compute_what_they_compute_in_peft() {
    for (case, _) in CASES {
        let found = logits(&adapted(case, &case_dir(case)));
        let apart = difference(&found, &expected(case));
        assert!(apart < 1e-5, "{case}: {apart}");
        let base = logits(&base_of(case).model);
        assert!(difference(&found, &base) > 1e-2, "{case}: nothing changed");
    }
}

/// Without leave to change the model, parameters that are not its own are an error.
#[test]
fn parameters_of_another_base_are_named() {
    for (case, changes) in CASES {
        let mut model = base_of(case).model;
        match Adapters::load_hf(case_dir(case), &model) {
            Ok(adapters) => {
                assert!(!changes, "{case}");
                peft::activate(&mut model, &adapters).unwrap();
                assert!(
                    difference(&logits(&model), &expected(case)) < 1e-5,
                    "{case}"
                );
            }
            Err(Error::OtherParameters { parameters, .. }) => {
                assert!(changes, "{case}: {parameters:?}");
                assert!(!parameters.is_empty());
            }
            Err(error) => panic!("{case}: {error}"),
        }
    }
    let names = |case: &str| match Adapters::open(case_dir(case), &base_of(case).model) {
        Err(error @ Error::OtherParameters { .. }) => {
            assert!(error.to_string().contains("open_with_base"), "{error}");
            let Error::OtherParameters { parameters, .. } = error else {
                unreachable!();
            };
            parameters
        }
        other => panic!("{case}: {other:?}"),
    };
    let (embedding, head) = ("model.embed_tokens.weight", "lm_head.weight");
    assert_eq!(names("saved"), [head, embedding]);
    assert_eq!(names("tied_saved_head"), [head]);
    assert_eq!(names("tied_saved_embedding"), [embedding]);
    assert_eq!(names("tokens"), [embedding]);
    assert_eq!(names("dora_head"), [head]);
    assert!(names("opt_bias_all").contains(&"model.decoder.layers.0.fc1.bias".to_string()));
    assert!(
        names("opt_bias_all").contains(&"model.decoder.layers.1.final_layer_norm.bias".to_string())
    );
}

/// The head becomes a weight of its own where PEFT trained it apart from the embedding, and only there.
#[test]
fn heads_are_untied_where_they_differ() {
    for (case, tied) in [
        ("tied_saved_embedding", false),
        ("tied_saved_head", false),
        ("tied_saved", false),
        ("tied_ensured", true),
        ("tied_lora_embedding", false),
        ("tied_lora_head", false),
        ("tied_tokens", true),
    ] {
        let mut lm = base_of(case);
        assert!(lm.model.config().tie_word_embeddings());
        let adapters = Adapters::open_with_base(case_dir(case), &mut lm.model).unwrap();
        assert_eq!(lm.model.config().tie_word_embeddings(), tied, "{case}");
        // The changed base and the adapters are read back.
        let dir = tempfile::tempdir().unwrap();
        let [base, ours, peft] = ["base", "ours", "peft"].map(|name| dir.path().join(name));
        models::save(&lm, &base).unwrap();
        adapters.save(&ours).unwrap();
        adapters.save_hf(&peft, &lm.model).unwrap();
        for adapters in [ours, peft] {
            let mut again = models::load(&base, &Device::flex()).unwrap().model;
            let adapters = Adapters::open(adapters, &again).unwrap();
            peft::activate(&mut again, &adapters).unwrap();
            assert!(
                difference(&logits(&again), &expected(case)) < 1e-5,
                "{case}"
            );
        }
    }
}

/// A packed head becomes the sum of what it dequantizes to and its LoRA.
#[test]
fn adapters_of_a_packed_head_are_added_to_it() {
    let mut model = base_of("lora_ends").model;
    let rtn = Rtn::new().with_bits(4).with_group_size(8);
    models::quantize_head(&mut model, &rtn).unwrap();
    let mut dense = model.clone();
    for weight in dense.other_weights_mut() {
        *weight = Weight::frozen(weight.to_dense());
    }
    // Without the matrices that PEFT saves beside the adapters.
    let of_adapters = |name: &str| (!name.contains("base_layer")).then(|| name.to_string());
    let dir = edited("lora_ends", of_adapters, |_| ());
    for model in [&mut model, &mut dense] {
        let adapters = Adapters::open_with_base(dir.path(), model).unwrap();
        peft::activate(model, &adapters).unwrap();
    }
    assert_eq!(logits(&model), logits(&dense));
    assert!(difference(&logits(&model), &expected("lora_ends")) > 1e-5);
    assert!(
        model
            .other_weights()
            .iter()
            .all(|(_, weight)| weight.format().is_none())
    );
}

/// A copy of a directory with other names of tensors and another configuration.
fn edited(
    case: &str,
    rename: impl Fn(&str) -> Option<String>,
    edit: impl FnOnce(&mut Value),
) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut config: Value = tensor_files::read_json(&case_dir(case).join(CONFIG)).unwrap();
    edit(&mut config);
    tensor_files::write_json(&dir.path().join(CONFIG), &config).unwrap();
    let mut file = TensorFile::open(&case_dir(case).join(TENSORS)).unwrap();
    let mut tensors = Vec::new();
    for name in file.names() {
        let Some(new) = rename(&name) else { continue };
        let tensor = match file.shape(&name).unwrap().len() {
            1 => {
                let (values, dims) = file.floats::<1>(&name).unwrap();
                LazyTensor::floats_as(FloatType::F32, dims, move || values)
            }
            _ => {
                let (values, dims) = file.floats::<2>(&name).unwrap();
                LazyTensor::floats_as(FloatType::F32, dims, move || values)
            }
        };
        tensors.push((new, tensor));
    }
    tensor_files::write_tensors(&dir.path().join(TENSORS), tensors).unwrap();
    dir
}

/// State dicts have the name of the adapter, and the wrappers of `torch.compile` and FSDP.
#[test]
fn state_dicts_are_read() {
    let renamings: [fn(&str) -> String; 4] = [
        |name| name.replace(".weight", ".default.weight"),
        |name| format!("_orig_mod.{name}"),
        |name| name.replace("base_model.model.", "base_model.model._orig_mod."),
        |name| name.replace(".lora", "._fsdp_wrapped_module.lora"),
    ];
    for rename in renamings {
        let dir = edited("look_ahead", |name| Some(rename(name)), |_| ());
        let found = logits(&adapted("look_ahead", dir.path()));
        assert!(difference(&found, &expected("look_ahead")) < 1e-5);
    }
    let rename = |name: &str| match name {
        "base_model.model.lm_head.weight" => {
            Some("base_model.model.lm_head.modules_to_save.default.weight".into())
        }
        name => Some(name.into()),
    };
    let dir = edited("saved", rename, |_| ());
    assert!(difference(&logits(&adapted("saved", dir.path())), &expected("saved")) < 1e-5);
    // Not under the prefix of PEFT: it would not find them.
    let dir = edited(
        "look_ahead",
        |name| Some(name.replace("base_model.model.", "")),
        |_| (),
    );
    let error = Adapters::load_hf(dir.path(), &base_of("look_ahead").model).unwrap_err();
    assert!(
        error.to_string().contains("is no tensor of an adapter"),
        "{error}"
    );
}

#[test]
fn directories_that_do_not_fit_are_refused() {
    let refusal = |case: &str, dir: &Path| {
        let mut model = base_of(case).model;
        let before = Fingerprint::of(&model);
        let error = Adapters::open_with_base(dir, &mut model).unwrap_err();
        assert_eq!(Fingerprint::of(&model), before, "{case}");
        error.to_string()
    };
    let same = |name: &str| Some(name.to_string());
    let no = |part: &'static str| move |name: &str| (!name.contains(part)).then(|| name.into());
    let set = |key: &'static str, value: Value| move |config: &mut Value| config[key] = value;
    for (case, rename, edit, part) in [
        // A module that is to be in the file.
        (
            "saved",
            &no("lm_head") as &dyn Fn(&str) -> Option<String>,
            None,
            "lm_head.weight",
        ),
        (
            "tokens",
            &no("token_adapter"),
            None,
            "trainable_token_indices",
        ),
        (
            "tokens",
            &same,
            Some(("trainable_token_indices", json!([1]))),
            "is [2, 8], not [1, 8]",
        ),
        (
            "tokens",
            &same,
            Some(("trainable_token_indices", json!([1, 16]))),
            "for token 16 of 16",
        ),
        (
            "tokens",
            &same,
            Some(("trainable_token_indices", Value::Null)),
            "does not list",
        ),
        (
            "tokens",
            &same,
            Some(("trainable_token_indices", json!([-1]))),
            "`trainable_token_indices` is [-1]",
        ),
        (
            "lora_ends",
            &no("lm_head.lora_A"),
            None,
            "lm_head.lora_A.weight",
        ),
        ("lora_ends", &no("lm_head"), None, "lm_head.lora_A.weight"),
        (
            "lora_ends",
            &same,
            Some(("target_modules", json!(["q_proj", "lm_head"]))),
            "which `adapter_config.json` does not target",
        ),
        (
            "lora_ends",
            &same,
            Some(("use_dora", json!(true))),
            "lora_magnitude_vector",
        ),
        (
            "look_ahead",
            &same,
            Some(("target_modules", Value::Null)),
            "target_modules is null",
        ),
        (
            "look_ahead",
            &same,
            Some(("target_modules", json!("nothing"))),
            "does not target",
        ),
        (
            "look_ahead",
            &same,
            Some(("task_type", json!("SEQ_CLS"))),
            "head of classes",
        ),
        (
            "saved",
            &|name: &str| Some(name.replace("lm_head", "score")),
            Some(("modules_to_save", json!(["score"]))),
            "has no parameter `score.weight`",
        ),
    ] {
        let dir = edited(case, rename, |config| {
            if let Some((key, value)) = edit {
                set(key, value)(config);
            }
        });
        let error = refusal(case, dir.path());
        assert!(error.contains(part), "{case}: {error}");
    }
    // Under two names.
    let rename = |name: &str| {
        Some(name.replace(
            ".1.self_attn.q_proj.lora_A",
            ".0.self_attn.q_proj.lora_A.default",
        ))
    };
    let dir = edited("look_ahead", rename, |_| ());
    assert!(refusal("look_ahead", dir.path()).contains("under two names"));
    // Of a vocabulary of another size.
    let dir = edited("saved", same, |_| ());
    let model = Model::init(
        super::fixtures::llama()
            .with_hidden_size(8)
            .with_vocab_size(17),
        0,
        &Device::flex(),
    );
    let error = Adapters::load_hf(dir.path(), &model).unwrap_err();
    assert!(
        error.to_string().contains("vocabulary was resized"),
        "{error}"
    );
    // A pickle.
    std::fs::rename(
        dir.path().join(TENSORS),
        dir.path().join("adapter_model.bin"),
    )
    .unwrap();
    let error = refusal("saved", dir.path());
    assert!(
        error.contains("adapter_model.bin") && error.contains("pickle"),
        "{error}"
    );
}

#[test]
fn types_of_adapters_that_are_not_read_are_named() {
    for name in [
        "IA3",
        "ADALORA",
        "PROMPT_TUNING",
        "PREFIX_TUNING",
        "LOHA",
        "LOKR",
        "OFT",
        "BOFT",
        "LN_TUNING",
    ] {
        let dir = edited(
            "look_ahead",
            |name| Some(name.into()),
            |config| config["peft_type"] = name.into(),
        );
        let error = Adapters::load_hf(dir.path(), &base_of("look_ahead").model).unwrap_err();
        assert!(
            error.to_string().contains(&format!("peft_type is {name}")),
            "{error}"
        );
    }
    for name in [
        "pissa",
        "pissa_niter_16",
        "olora",
        "corda",
        "loftq",
        "lora_ga",
        "PiSSA",
    ] {
        let dir = edited(
            "look_ahead",
            |name| Some(name.into()),
            |config| config["init_lora_weights"] = name.into(),
        );
        let error = Adapters::load_hf(dir.path(), &base_of("look_ahead").model).unwrap_err();
        assert!(error.to_string().contains("changed the base"), "{error}");
    }
    for init in [
        json!("gaussian"),
        json!("eva"),
        json!("orthogonal"),
        json!("mica"),
        json!(false),
        Value::Null,
    ] {
        let dir = edited(
            "look_ahead",
            |name| Some(name.into()),
            |config| config["init_lora_weights"] = init,
        );
        assert!(Adapters::load_hf(dir.path(), &base_of("look_ahead").model).is_ok());
    }
    // Of no meaning for linear layers.
    let dir = edited(
        "look_ahead",
        |name| Some(name.into()),
        |config| config["fan_in_fan_out"] = true.into(),
    );
    assert!(Adapters::load_hf(dir.path(), &base_of("look_ahead").model).is_ok());
}

/// Each format of directories names the function that reads it.
#[test]
fn directories_of_the_other_format_are_named() {
    let case = "look_ahead";
    let mut model = base_of(case).model;
    let error = Adapters::load(case_dir(case), &Device::flex()).unwrap_err();
    let named = matches!(
        &error,
        Error::OtherDirectory {
            function: "Adapters::load_hf",
            ..
        }
    );
    assert!(named, "{error}");
    peft::attach(&mut model, &Lora::new(1)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let ours = dir.path().join("ours");
    Adapters::of(&model).unwrap().save(&ours).unwrap();
    let error = Adapters::load_hf(&ours, &model).unwrap_err();
    let named = matches!(
        &error,
        Error::OtherDirectory {
            function: "Adapters::load",
            ..
        }
    );
    assert!(named, "{error}");
    assert!(Adapters::open(&ours, &model).is_ok());
    assert!(Adapters::open_with_base(&ours, &mut model).is_ok());
}

mod interop {
    use super::*;

    /// What is written here is read by PEFT with the same outputs, whatever the ranks and the targets.
    #[test]
    #[ignore = "needs Python with torch, transformers and peft"]
    fn directories_are_read_by_peft() {
        let dir = tempfile::tempdir().unwrap();
        let mut written = Vec::new();
        let mut write = |name: &str, lm: &Pretrained, adapters: &Adapters, expected: Vec<f32>| {
            let place = dir.path().join(name);
            std::fs::create_dir(&place).unwrap();
            models::save(lm, place.join("base")).unwrap();
            adapters.save_hf(place.join("adapter"), &lm.model).unwrap();
            tensor_files::write_json(&place.join("expected.json"), &expected).unwrap();
            written.push(place);
        };
        for (case, _) in CASES {
            let mut lm = base_of(case);
            let adapters = Adapters::open_with_base(case_dir(case), &mut lm.model).unwrap();
            write(case, &lm, &adapters, expected(case));
        }
        // Each layer of another rank and α.
        let mut lm = base_of("look_ahead");
        let paths = lm.model.linears().into_iter().map(|(path, _)| path);
        let paths: Vec<String> = paths.collect();
        for (at, path) in paths.iter().enumerate() {
            let rank = 1 + at % 3;
            let linears = lm.model.linears();
            let (_, linear) = linears.iter().find(|(of, _)| of == path).unwrap();
            let [d_in, d_out] = linear.weight().dims();
            let random =
                |dims| Tensor::random(dims, burn::tensor::Distribution::Default, &Device::flex());
            let lora = Lora::new(rank).with_alpha(1.0 + at as f32 / 4.0);
            let lora = lora.init_at(path, linear, random([d_in, rank]), random([rank, d_out]));
            let lora = Adapter::Lora(lora.unwrap());
            let weight = linear.weight().clone();
            let mut linears = lm.model.linears_mut();
            let (_, linear) = linears.iter_mut().find(|(of, _)| of == path).unwrap();
            // Some layers have none.
            if at % 5 != 0 {
                linear.replace(path, weight, Some(lora)).unwrap();
            }
        }
        let expected = logits(&lm.model);
        let adapters = peft::detach(&mut lm.model).unwrap();
        write("ranks", &lm, &adapters, expected);

        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/peft_logits.py");
        let ids = golden("peft").join("logits.safetensors");
        let python = std::env::var_os("INTEROP_PYTHON").unwrap_or("python3".into());
        let status = std::process::Command::new(python)
            .arg(script)
            .arg(ids)
            .args(&written)
            .status();
        assert!(status.unwrap().success());
    }
}
