//! Directories of adapters, and adapters that are switched.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use peft::{
    Adapter, Adapters, Bayesian, Error, Linear, Linears, Lora, Method, Targets, Tile, Vera, Weight,
};
use proptest::prelude::*;
use tensor_files::{FloatType, LazyTensor, TensorFile};

use crate::cases::cases;
use crate::model::{HIDDEN, WIDTH, adapted, dense, logits, tensor, tune};
use crate::property;

proptest! {
    #![proptest_config(property(64))]

    /// A directory gives the adapters back, and switching tasks there and back changes no bit.
    #[test]
    fn adapters_are_saved_and_switched_bit_for_bit(case in cases(), seed in 0..1000u64) {
        let dir = tempfile::tempdir().unwrap();
        let base = case.base.model(seed);
        let mut tasks = Vec::new();
        for task in 0..2 {
            let mut model = base.clone();
            peft::attach(&mut model, &*case.method(Targets::All)).unwrap();
            tune(&mut model, seed + 10 * task);
            let path = dir.path().join(format!("task-{task}"));
            Adapters::of(&model).unwrap().save(&path).unwrap();
            tasks.push((Adapters::load(&path, &Device::flex()).unwrap(), logits(&model)));
        }
        let mut model = base.clone();
        let none = peft::activate(&mut model, &tasks[0].0).unwrap();
        prop_assert_eq!(none.layers().count(), 0);
        prop_assert_eq!(logits(&model), tasks[0].1.clone());
        let first = peft::activate(&mut model, &tasks[1].0).unwrap();
        prop_assert_eq!(logits(&model), tasks[1].1.clone());
        peft::activate(&mut model, &first).unwrap();
        prop_assert_eq!(logits(&model), tasks[0].1.clone());
        peft::activate(&mut model, &none).unwrap();
        prop_assert_eq!(logits(&model), logits(&base));
    }
}

#[test]
fn adapters_of_another_base_are_refused() {
    let adapters = Adapters::of(&adapted(1)).unwrap();
    for seed in [2, 3] {
        let mut other = adapted(seed);
        let before = logits(&other);
        let error = peft::activate(&mut other, &adapters).unwrap_err();
        assert!(matches!(error, Error::OtherBase { .. }));
        assert_eq!(logits(&other), before);
    }
    // The base after a merge is another one.
    let mut merged = adapted(1);
    tune(&mut merged, 1);
    peft::merge(&mut merged).unwrap();
    assert!(matches!(
        peft::activate(&mut merged, &adapters),
        Err(Error::OtherBase { .. })
    ));
}

#[test]
fn damaged_adapter_directories_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let adapters = Adapters::of(&adapted(1)).unwrap();
    let write = |name: &str| {
        let path = dir.path().join(name);
        adapters.save(&path).unwrap();
        path
    };
    let load = |path: &std::path::Path| Adapters::load(path, &Device::flex()).unwrap_err();

    let path = write("twice");
    assert!(matches!(
        adapters.save(&path),
        Err(Error::File(tensor_files::Error::OutputExists { .. }))
    ));
    assert!(Adapters::load(&path, &Device::flex()).is_ok());

    let path = write("truncated");
    let file = path.join("adapter_model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    for n in [0, 7, 100, bytes.len() - 1] {
        std::fs::write(&file, &bytes[..n]).unwrap();
        let error = load(&path);
        assert!(
            matches!(&error, Error::File(tensor_files::Error::File { .. })),
            "{n}: {error}"
        );
    }
    std::fs::write(
        &file,
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    )
    .unwrap();
    assert!(load(&path).to_string().contains("git lfs pull"));
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(
        load(&path),
        Error::File(tensor_files::Error::Io { .. })
    ));

    let config = |name: &str, from: &str, to: &str| {
        let path = write(name);
        let file = path.join("adapter_config.json");
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains(from));
        std::fs::write(&file, text.replacen(from, to, 1)).unwrap();
        load(&path)
    };
    let error = config("missing", "mlp.down", "mlp.gate");
    assert!(
        matches!(&error, Error::File(tensor_files::Error::MissingTensor { tensor, .. }) if tensor.starts_with("mlp.gate"))
    );
    let error = config("extra", "\"mlp.up\":", "\"mlp.down\":");
    assert!(
        matches!(&error, Error::File(tensor_files::Error::Tensor { tensor, .. }) if tensor.starts_with("mlp.up")),
        "{error}"
    );
    let error = config("method", "\"peqa\"", "\"ia3\"").to_string();
    assert!(error.contains("unknown variant `ia3`"), "{error}");
    let error = config("setting", "\"zeros\":", "\"zero\":").to_string();
    assert!(error.contains("unknown field `zero`"), "{error}");
    assert!(
        config("version", "\"format_version\": 5", "\"format_version\": 1")
            .to_string()
            .contains("is 1")
    );
    assert!(matches!(
        config("json", "{", "["),
        Error::File(tensor_files::Error::File { .. })
    ));
}

/// Files of LoRA whose tensors do not belong together.
#[test]
fn damaged_lora_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let lora = |rank| {
        let mut model = dense(1);
        peft::attach(&mut model, &Lora::new(rank)).unwrap();
        Adapters::of(&model).unwrap()
    };
    let path = dir.path().join("lora");
    lora(2).save(&path).unwrap();
    let file = path.join("adapter_model.safetensors");
    let write = |[a, b]: [[usize; 2]; 2]| {
        let tensors = [("a", a), ("b", b)].map(|(name, dims)| {
            let values = move || vec![0.5; dims[0] * dims[1]];
            (
                format!("mlp.down.{name}"),
                LazyTensor::floats_as(FloatType::F32, dims, values),
            )
        });
        tensor_files::write_tensors(&file, tensors).unwrap();
        Adapters::load(&path, &Device::flex()).unwrap_err()
    };
    for dims in [[[WIDTH, 2], [3, HIDDEN]], [[WIDTH, 0], [0, HIDDEN]]] {
        let error = write(dims);
        let named = matches!(&error, Error::File(tensor_files::Error::Tensor { tensor, .. }) if tensor == "mlp.down.b");
        assert!(named, "{error}");
    }
    let error = write([[WIDTH, 2], [2, HIDDEN]]);
    let named = matches!(&error, Error::File(tensor_files::Error::MissingTensor { tensor, .. }) if tensor == "mlp.up.a");
    assert!(named, "{error}");
    for (at, (setting, value)) in [("alpha", "-1.0"), ("dropout", "1.0")]
        .into_iter()
        .enumerate()
    {
        let dir = dir.path().join(format!("setting-{at}"));
        lora(2).save(&dir).unwrap();
        let config = dir.join("adapter_config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        let old = match setting {
            "alpha" => "\"alpha\": 2.0",
            _ => "\"dropout\": 0.0",
        };
        assert!(text.contains(old), "{text}");
        std::fs::write(
            &config,
            text.replace(old, &format!("\"{setting}\": {value}")),
        )
        .unwrap();
        let error = Adapters::load(&dir, &Device::flex()).unwrap_err();
        let named = matches!(error, Error::Setting { setting: found, .. } if found == setting);
        assert!(named, "{error}");
    }
    // Adapters of other dimensions than the layer's, with the fingerprint of its base.
    let fit = |dims: [usize; 2]| {
        let mut model = dense(1);
        let other = Linear::new(Weight::frozen(tensor(3, dims)), None);
        let mut small = model.clone();
        small.down = other;
        peft::attach(&mut small, &Lora::new(2)).unwrap();
        let dir = dir.path().join(format!("{dims:?}"));
        Adapters::of(&small).unwrap().save(&dir).unwrap();
        let config = "adapter_config.json";
        std::fs::copy(path.join(config), dir.join(config)).unwrap();
        let adapters = Adapters::load(&dir, &Device::flex()).unwrap();
        peft::activate(&mut model, &adapters).map(|_| ())
    };
    for dims in [[WIDTH - 1, HIDDEN], [WIDTH, HIDDEN - 1]] {
        let error = fit(dims).unwrap_err();
        let named = matches!(&error, Error::Shape { path, .. } if path == "mlp.down");
        assert!(named, "{error}");
    }
    assert!(fit([WIDTH, HIDDEN]).is_ok());
}

/// Each factor is finite, and their product would not be.
#[test]
fn factors_whose_product_is_infinite_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let methods: [&dyn Method; 5] = [
        &Lora::new(2),
        &Lora::new(2).with_dora(true),
        &Vera::new(2),
        &Tile::q_bara(2),
        &Bayesian::new(2),
    ];
    let factors = ["a", "b", "d"].map(|factor| format!("mlp.up.{factor}"));
    for (at, method) in methods.into_iter().enumerate() {
        let mut model = dense(1);
        peft::attach(&mut model, method).unwrap();
        let path = dir.path().join(at.to_string());
        Adapters::of(&model).unwrap().save(&path).unwrap();
        peft::detach(&mut model).unwrap();
        let file = path.join("adapter_model.safetensors");
        // The adapters with all elements of one layer's factors as large as this.
        let mut with = |value: f32| {
            let mut old = TensorFile::open(&file).unwrap();
            let tensors = old.names().into_iter().map(|name| {
                let is_factor = factors.contains(&name);
                let new = |values: Vec<f32>| match is_factor {
                    true => vec![value; values.len()],
                    false => values,
                };
                let tensor = if old.shape(&name).unwrap().len() == 1 {
                    let (values, shape) = old.floats::<1>(&name).unwrap();
                    let values = new(values);
                    LazyTensor::floats_as(FloatType::F32, shape, move || values.clone())
                } else {
                    let (values, shape) = old.floats::<2>(&name).unwrap();
                    let values = new(values);
                    LazyTensor::floats_as(FloatType::F32, shape, move || values.clone())
                };
                (name, tensor)
            });
            let tensors: Vec<_> = tensors.collect();
            tensor_files::write_tensors(&file, tensors).unwrap();
            let adapters = Adapters::load(&path, &Device::flex()).unwrap();
            peft::activate(&mut model, &adapters).map(drop)
        };
        let error = with(1e20).unwrap_err();
        let is_named = matches!(&error, Error::Overflow { path, .. } if path == "mlp.up");
        assert!(is_named, "{at}: {error:?}");
        with(1e15).unwrap();
    }
}

/// Paths of layers that are ends of others, or that are no patterns for themselves alone.
const ODD_PATHS: [&str; 7] = [
    "proj",
    "block.proj",
    "block.1.proj",
    "block.11.proj",
    "block.1xproj",
    "a+b.(up)",
    "a+b.up",
];

#[derive(Module, Debug)]
struct Odd {
    layers: Vec<Linear>,
}

impl Linears for Odd {
    fn linears(&self) -> Vec<(String, &Linear)> {
        let paths = ODD_PATHS.map(String::from).into_iter();
        paths.zip(&self.layers).collect()
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        let paths = ODD_PATHS.map(String::from).into_iter();
        paths.zip(&mut self.layers).collect()
    }
}

/// What is written for PEFT has each layer's rank and alpha, and no layer more, whatever the paths.
#[test]
fn patterns_that_are_written_match_one_layer_each() {
    let device = Device::flex();
    let linear = || Linear::new(Weight::frozen(Tensor::ones([8, 8], &device)), None);
    let base = Odd {
        layers: ODD_PATHS.iter().map(|_| linear()).collect(),
    };
    let dir = tempfile::tempdir().unwrap();
    for adapted in 1..1u32 << ODD_PATHS.len() {
        let is_adapted = |at: usize| adapted >> at & 1 == 1;
        let mut model = base.clone();
        for (at, linear) in model.layers.iter_mut().enumerate() {
            if is_adapted(at) {
                let method = Lora::new(1 + at).with_alpha(1.0 + at as f32);
                let adapter = method.init(ODD_PATHS[at], linear).unwrap();
                let weight = linear.weight().clone();
                linear
                    .replace(ODD_PATHS[at], weight, Some(adapter))
                    .unwrap();
            }
        }
        let adapters = Adapters::of(&model).unwrap();
        let path = dir.path().join(format!("{adapted}"));
        adapters.save_hf(&path, &base).unwrap();
        let read = Adapters::load_hf(&path, &base).unwrap();
        let of = |adapters: &Adapters| -> Vec<(String, usize, f32)> {
            let layers = adapters.layers().map(|(path, adapter)| match adapter {
                Adapter::Lora(lora) => (path.to_string(), lora.rank(), lora.alpha()),
                other => panic!("{other:?}"),
            });
            layers.collect()
        };
        assert_eq!(of(&read), of(&adapters), "{adapted:b}");
    }
}
