//! VeRA against PEFT (`tests/golden/README.md`).

use std::path::Path;

use burn::module::{Module, Param};
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor, TensorData};
use peft::{Adapter, Adapters, Error, Linear, Linears, OffGrid, Vera, Weight};
use quant_core::Rtn;
use tensor_files::{FloatType, LazyTensor, TensorFile, write_tensors};

use crate::qa_lora::{difference, golden_dir, values};

/// The model of `make_vera.py`.
#[derive(Module, Debug)]
struct Mlp {
    up: Linear,
    down: Linear,
}

impl Linears for Mlp {
    fn linears(&self) -> Vec<(String, &Linear)> {
        vec![("up".into(), &self.up), ("down".into(), &self.down)]
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        vec![("up".into(), &mut self.up), ("down".into(), &mut self.down)]
    }
}

impl Mlp {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.down.forward(silu(self.up.forward(x)))
    }
}

fn matrix(name: &str) -> Tensor<2> {
    let mut file = TensorFile::open(&golden_dir().join("vera/reference.safetensors")).unwrap();
    let (values, dims) = file.floats::<2>(name).unwrap();
    Tensor::from_data(TensorData::new(values, dims), &Device::flex())
}

fn vector(name: &str) -> Tensor<1> {
    let mut file = TensorFile::open(&golden_dir().join("vera/reference.safetensors")).unwrap();
    let (values, dims) = file.floats::<1>(name).unwrap();
    Tensor::from_data(TensorData::new(values, dims), &Device::flex())
}

fn base() -> Mlp {
    let weight = |name: &str| Weight::frozen(matrix(name).transpose());
    let bias = Param::from_tensor(vector("up.bias")).set_require_grad(false);
    Mlp {
        up: Linear::new(weight("up.weight"), Some(bias)),
        down: Linear::new(weight("down.weight"), None),
    }
}

#[test]
fn vera_is_pefts() {
    let mut model = base();
    let adapters = Adapters::load_hf(golden_dir().join("vera"), &model).unwrap();
    let x = matrix("x");
    assert!(difference(model.forward(x.clone()), matrix("base_y")) < 1e-6);
    let attached = peft::activate(&mut model, &adapters).unwrap();
    assert_eq!(attached.layers().count(), 0);
    assert!(difference(model.forward(x.clone()), matrix("y")) < 1e-6);
    assert!(difference(matrix("base_y"), matrix("y")) > 1e-2);

    let tracked = model.clone().train();
    let gradients = tracked
        .forward(x.clone().autodiff())
        .square()
        .sum()
        .backward();
    for (path, linear) in tracked.linears() {
        let Some(Adapter::Vera(vera)) = linear.adapter() else {
            panic!("`{path}` has no VeRA");
        };
        for (trained, name) in [(vera.d(), "vera_lambda_d"), (vera.b(), "vera_lambda_b")] {
            let name = format!("grad.base_model.model.{path}.{name}");
            let found = trained.grad(&gradients).unwrap().unsqueeze();
            let expected = vector(&name).unsqueeze();
            assert!(difference(found, expected) < 1e-5, "{name}");
        }
    }

    peft::merge(&mut model).unwrap();
    assert!(difference(model.forward(x), matrix("merged_y")) < 1e-6);
    for (path, linear) in model.linears() {
        let merged = linear.weight().to_dense().transpose();
        let expected = matrix(&format!("merged.{path}.weight"));
        assert!(difference(merged, expected) < 1e-6, "{path}");
    }
}

/// Both formats of files hold the factors once, and PEFT's is what PEFT wrote.
#[test]
fn vera_is_written_with_its_factors() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = base();
    let golden = golden_dir().join("vera");
    let adapters = Adapters::load_hf(&golden, &model).unwrap();
    let (ours, peft) = (dir.path().join("ours"), dir.path().join("peft"));
    adapters.save(&ours).unwrap();
    adapters.save_hf(&peft, &model).unwrap();
    let tensors = |dir: &Path| {
        let mut file = TensorFile::open(&dir.join("adapter_model.safetensors")).unwrap();
        let names = file.names();
        let mut values = |name: &str| match file.shape(name).unwrap().len() {
            1 => file.floats::<1>(name).unwrap().0,
            _ => file.floats::<2>(name).unwrap().0,
        };
        let read = names.iter().map(|name| (name.clone(), values(name)));
        read.collect::<Vec<_>>()
    };
    assert_eq!(tensors(&peft), tensors(&golden));
    let shared = tensors(&ours);
    let shared = shared
        .iter()
        .filter(|(name, _)| name.starts_with("shared."));
    assert_eq!(shared.count(), 2);
    let config = |dir: &Path| -> serde_json::Value {
        let mut config: serde_json::Value =
            tensor_files::read_json(&dir.join("adapter_config.json")).unwrap();
        // These say where an adapter comes from.
        for key in ["auto_mapping", "projection_prng_key", "task_type"] {
            config[key] = serde_json::Value::Null;
        }
        config
    };
    assert_eq!(config(&peft), config(&golden));

    let loaded = Adapters::load(&ours, &Device::flex()).unwrap();
    peft::activate(&mut model, &adapters).unwrap();
    let y = values(model.forward(matrix("x")));
    for again in [loaded, Adapters::load_hf(&peft, &model).unwrap()] {
        peft::activate(&mut model, &again).unwrap();
        assert_eq!(values(model.forward(matrix("x"))), y);
    }
}

/// Directories that cannot be read, and adapters that cannot be in one directory.
#[test]
fn strange_veras_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = base();
    let golden = golden_dir().join("vera");
    let mut n = 0;
    let mut load = |key: &str, value: serde_json::Value, keep: &dyn Fn(&str) -> bool| {
        n += 1;
        let path = dir.path().join(format!("{n}"));
        std::fs::create_dir(&path).unwrap();
        let mut config: serde_json::Value =
            tensor_files::read_json(&golden.join("adapter_config.json")).unwrap();
        config[key] = value;
        tensor_files::write_json(&path.join("adapter_config.json"), &config).unwrap();
        let mut file = TensorFile::open(&golden.join("adapter_model.safetensors")).unwrap();
        let names = file.names().into_iter().filter(|name| keep(name));
        let names: Vec<String> = names.collect();
        let tensors = names.into_iter().map(|name| {
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
            (name, tensor)
        });
        write_tensors(&path.join("adapter_model.safetensors"), tensors).unwrap();
        Adapters::load_hf(&path, &model)
    };
    assert!(load("d_initial", 0.3.into(), &|_| true).is_ok());
    for (key, value, part) in [
        ("save_projection", false.into(), "save_projection=True"),
        ("bias", "vera_only".into(), "bias is \"vera_only\""),
        ("r", 5.into(), "says rank 5"),
        ("vera_dropout", 1.5.into(), "dropout is 1.5"),
        ("rank_pattern", serde_json::json!({"up": 2}), "rank_pattern"),
    ] {
        let error = load(key, value, &|_| true).unwrap_err();
        assert!(error.to_string().contains(part), "{key}: {error}");
    }
    for missing in ["base_model.vera_A", "base_model.model.up.vera_lambda_b"] {
        let error = load("d_initial", 0.1.into(), &|name| name != missing).unwrap_err();
        let named = matches!(&error, Error::File(tensor_files::Error::MissingTensor { tensor, .. }) if tensor == missing);
        assert!(named, "{error}");
    }

    // Two pairs of factors are two methods of PEFT's, and one directory of ours.
    peft::attach(&mut model, &Vera::new(3).with_targets(["up"])).unwrap();
    peft::attach(
        &mut model,
        &Vera::new(3).with_targets(["down"]).with_seed(1),
    )
    .unwrap();
    let adapters = Adapters::of(&model).unwrap();
    let error = adapters
        .save_hf(dir.path().join("two"), &model)
        .unwrap_err();
    assert!(matches!(error, Error::NotForPeft { .. }), "{error}");
    let ours = dir.path().join("ours");
    adapters.save(&ours).unwrap();
    let loaded = Adapters::load(&ours, &Device::flex()).unwrap();
    let y = values(model.forward(matrix("x")));
    peft::activate(&mut model, &loaded).unwrap();
    assert_eq!(values(model.forward(matrix("x"))), y);

    // Factors that were changed are not those of their digest.
    let path = ours.join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let text = std::str::from_utf8(&bytes[8..8 + header]).unwrap();
    let infos: serde_json::Value = serde_json::from_str(text).unwrap();
    let (_, info) = (infos.as_object().unwrap().iter())
        .find(|(name, _)| name.starts_with("shared."))
        .unwrap();
    let at = info["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + header + at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = Adapters::load(&ours, &Device::flex()).unwrap_err();
    assert!(error.to_string().contains("digest"), "{error}");
}

/// A file holds the factors once. They are frozen, and are not counted as parameters.
#[test]
fn vera_stores_its_factors_once() {
    let mut model = base();
    let base = peft::Fingerprint::of(&model);
    let attached = peft::attach(&mut model, &Vera::new(256)).unwrap();
    assert_eq!(attached.n_trainable, (256 + 20) + (256 + 8));
    assert_eq!(peft::Fingerprint::of(&model), base);
    let adapters = peft::detach(&mut model).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vera");
    adapters.save(&path).unwrap();
    let n_bytes = |dir: &Path| {
        let file = std::fs::metadata(dir.join("adapter_model.safetensors"));
        file.unwrap().len() as usize
    };
    // The pair is that of the largest dimensions, 20 and 20.
    let floats = 256 * (20 + 20) + attached.n_trainable;
    assert!((4 * floats - 2 * attached.n_trainable..5 * floats).contains(&n_bytes(&path)));

    // Over a packed weight it stays beside it, or merges where that is asked for.
    for (path, linear) in model.linears_mut() {
        linear
            .quantize(&path, &Rtn::new().with_bits(4), None)
            .unwrap();
    }
    peft::attach(&mut model, &Vera::new(4)).unwrap();
    let error = peft::merge(&mut model).unwrap_err();
    assert!(
        matches!(error, Error::MergeIntoPacked { method: "VeRA", .. }),
        "{error}"
    );
    let certificate = peft::merge_with(&mut model, OffGrid::Dense).unwrap();
    assert_eq!(certificate.kind(), "bounded");
}
