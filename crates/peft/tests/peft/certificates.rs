//! What a fingerprint and a certificate cover.

use std::fs;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData};
use peft::{
    Adapters, Certificate, Error, Fingerprint, Identity, Linear, Linears, Lora, Peqa, Probe,
    TaskPack, Weight,
};
use quant_core::Rtn;

/// The order of a norm, which has the same parameter wherever it stands.
#[derive(Module, Debug)]
enum Order {
    Before(Param<Tensor<1>>),
    After(Param<Tensor<1>>),
}

/// A model with every kind of parameter that burn has.
#[derive(Module, Debug)]
struct Routed {
    proj: Linear,
    order: Order,
    is_routed: Param<Tensor<1, Bool>>,
    experts: Param<Tensor<1, Int>>,
    bias: Param<Tensor<1>>,
    #[module(skip)]
    heads: usize,
}

impl Linears for Routed {
    fn linears(&self) -> Vec<(String, &Linear)> {
        vec![("proj".into(), &self.proj)]
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        vec![("proj".into(), &mut self.proj)]
    }

    fn identity(&self) -> Identity {
        Identity::default().with_setting("heads", self.heads)
    }
}

/// Adds 1 to all floats.
struct Shift;

impl ModuleMapper for Shift {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|values| values.detach() + 1.0)
    }
}

fn ints(values: &[i64]) -> Param<Tensor<1, Int>> {
    let data = TensorData::new(values.to_vec(), [values.len()]);
    Param::initialized(
        ParamId::new(),
        Tensor::from_data(data, (&Device::flex(), DType::I64)),
    )
}

fn floats(values: &[f64], dtype: DType) -> Param<Tensor<1>> {
    let data = TensorData::new(values.to_vec(), [values.len()]);
    let values = Tensor::from_data(data, (&Device::flex(), dtype));
    Param::from_tensor(values).set_require_grad(false)
}

fn model() -> Routed {
    let device = Device::flex();
    let weight = Weight::frozen(Tensor::from_data([[0.5, -1.0], [2.0, 0.25]], &device));
    let is_routed = Tensor::from_data([true, false, true], &device);
    let mut model = Routed {
        proj: Linear::new(weight, None),
        order: Order::Before(floats(&[1.0, 2.0], DType::F32)),
        is_routed: Param::initialized(ParamId::new(), is_routed),
        experts: ints(&[-1, 1 << 40]),
        bias: floats(&[0.1, 0.5], DType::F64),
        heads: 2,
    };
    model.proj.quantize("proj", &Rtn::new(), None).unwrap();
    model
}

/// The merged model with its certificate.
fn merged() -> (Routed, Certificate) {
    let mut merged = model();
    peft::attach(&mut merged, &Peqa::new()).unwrap();
    let certificate = peft::merge(&mut merged).unwrap();
    (merged, certificate)
}

/// Other variants, truth values, integers of 64 bits and digits of `f64` are another model.
#[test]
fn every_kind_of_parameter_is_certified() {
    let (merged, certificate) = merged();
    certificate.verify(&merged).unwrap();
    certificate.verify(&merged.clone()).unwrap();
    let mut others = vec![merged.clone(); 7];
    others[0].order = Order::After(floats(&[1.0, 2.0], DType::F32));
    let is_routed = Tensor::from_data([true, true, true], &Device::flex());
    others[1].is_routed = Param::initialized(ParamId::new(), is_routed);
    others[2].experts = ints(&[-1, (1 << 40) + 1]);
    others[3].experts = ints(&[0xffff_ffff, 1 << 40]);
    others[4].bias = floats(&[0.1 + 1e-16, 0.5], DType::F64);
    others[5].bias = floats(&[0.1, 0.5], DType::F32);
    others[6].heads = 1;
    for (at, other) in others.iter().enumerate() {
        let error = certificate.verify(other).unwrap_err();
        assert!(matches!(error, Error::NotMerged { .. }), "{at}: {error}");
    }
    let error = certificate.verify(&others[6]).unwrap_err().to_string();
    assert_eq!(
        error,
        "the model is not the certified one: heads is 1 where 2 is expected"
    );
}

/// The type in which a device holds a value is not part of the model.
#[test]
fn values_are_certified_and_not_their_types() {
    let (merged, certificate) = merged();
    let mut other = merged.clone();
    other.order = Order::Before(floats(&[1.0, 2.0], DType::BF16));
    certificate.verify(&other).unwrap();
    let mut small = merged.clone();
    small.experts = ints(&[0, 7]);
    let base = Fingerprint::of(&small);
    let data = TensorData::new(vec![0u32, 7], [2]);
    let device = Device::flex();
    let experts = Tensor::from_data(data, (&device, DType::U32));
    small.experts = Param::initialized(ParamId::new(), experts);
    assert_eq!(Fingerprint::of(&small), base);
}

/// Its adapters would change the outputs of the merged model.
#[test]
fn an_adapted_model_is_not_the_merged_one() {
    let (mut merged, certificate) = merged();
    peft::attach(&mut merged, &Lora::new(1)).unwrap();
    let error = certificate.verify(&merged).unwrap_err();
    assert!(
        matches!(&error, Error::AlreadyAdapted { path } if path == "proj"),
        "{error}"
    );
}

/// Files of older versions, in which a fingerprint is the digest of the parameters.
#[test]
fn older_files_promise_what_they_did() {
    let (merged, certificate) = merged();
    let mut json = serde_json::to_value(&certificate).unwrap();
    assert_eq!(json["format_version"], 3);
    // Of the version between, which does not tell parameters apart.
    json["format_version"] = 2.into();
    let mut running = json["merged"]["running"].take();
    json["merged"].as_object_mut().unwrap().remove("running");
    let between: Certificate = serde_json::from_value(json.clone()).unwrap();
    between.verify(&merged).unwrap();
    assert_eq!(serde_json::to_value(&between).unwrap(), json);
    assert_eq!(between.merged.not_covered(), ["tokenizer"]);
    // 8 digits for the formats and for each parameter of numbers: the packed weight has three.
    running = running.as_str().unwrap().len().into();
    assert_eq!(running, 8 * (1 + 3 + 3));
    let parameters = json["merged"]["parameters"].clone();
    json["merged"] = parameters.clone();
    json.as_object_mut().unwrap().remove("format_version");
    let old: Certificate = serde_json::from_value(json).unwrap();
    assert_eq!(
        old.merged.not_covered(),
        ["structure", "settings", "tokenizer"]
    );
    assert!(
        old.to_string()
            .ends_with("not covered: structure, settings, tokenizer")
    );
    old.verify(&merged).unwrap();
    let mut other = merged.clone();
    other.heads = 1;
    old.verify(&other).unwrap();
    other.order = Order::Before(floats(&[1.0, 2.5], DType::F32));
    assert!(matches!(old.verify(&other), Err(Error::NotMerged { .. })));
    // Written again, it does not claim more.
    let again = serde_json::to_value(&old).unwrap();
    assert_eq!(again["format_version"], 1);
    assert_eq!(again["merged"], parameters);
    assert_eq!(serde_json::from_value::<Certificate>(again).unwrap(), old);

    // Adapters and tasks of older versions.
    let mut tuned = model();
    peft::attach(&mut tuned, &Peqa::new()).unwrap();
    tuned = tuned.map(&mut Shift);
    let mut base = tuned.clone();
    peft::detach(&mut base).unwrap();
    let mut tasks = peft::Tasks::new(base.clone()).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let (adapters, task) = (parent.path().join("adapters"), parent.path().join("task"));
    Adapters::of(&tuned).unwrap().save(&adapters).unwrap();
    TaskPack::of(&tuned).unwrap().save(&task).unwrap();
    for (file, version) in [
        (adapters.join("adapter_config.json"), 3),
        (task.join("task.json"), 1),
    ] {
        let mut json: serde_json::Value =
            serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!(json["format_version"], version + 2);
        json["format_version"] = version.into();
        json["base"] = json["base"]["parameters"].clone();
        fs::write(&file, json.to_string()).unwrap();
    }
    let old = Adapters::load(&adapters, &Device::flex()).unwrap();
    let again = parent.path().join("again");
    old.save(&again).unwrap();
    let config = |dir: &std::path::Path| fs::read(dir.join("adapter_config.json")).unwrap();
    let [first, again] = [&adapters, &again]
        .map(|dir| serde_json::from_slice::<serde_json::Value>(&config(dir)).unwrap());
    assert_eq!(first, again);
    let adapters = Adapters::load(&adapters, &Device::flex()).unwrap();
    peft::activate(&mut base, &adapters).unwrap();
    tasks
        .insert("task", TaskPack::load(&task).unwrap())
        .unwrap();
}

/// The message names the first parameter that is another one, also when one side is a file.
#[test]
fn a_difference_names_its_parameter() {
    let base = Fingerprint::of(&model());
    let text = serde_json::to_string(&base).unwrap();
    let stored: Fingerprint = serde_json::from_str(&text).unwrap();
    let mut others = vec![model(); 3];
    others[0].bias = floats(&[0.1, 0.75], DType::F64);
    others[1].order = Order::Before(floats(&[1.0, 2.5], DType::F32));
    others[1].bias = floats(&[0.1, 0.75], DType::F64);
    let weight = Tensor::from_data([[0.5, -1.0], [2.0, 0.5]], &Device::flex());
    others[2].proj = Linear::new(Weight::frozen(weight), None);
    let mut packed = others[2].clone();
    packed.proj.quantize("proj", &Rtn::new(), None).unwrap();
    let expected = [
        "bias",
        "order",
        "the formats of the layers",
        "proj.weight.scales",
    ];
    for (other, name) in others.iter().chain([&packed]).zip(expected) {
        for base in [&base, &stored] {
            let differences = base.differences(&Fingerprint::of(other));
            let end = format!(" is expected, from `{name}` on");
            assert!(differences[0].ends_with(&end), "{differences:?}");
        }
    }
    // Of two files, the place is known.
    let other = serde_json::to_string(&Fingerprint::of(&others[0])).unwrap();
    let other: Fingerprint = serde_json::from_str(&other).unwrap();
    let differences = stored.differences(&other);
    assert!(
        differences[0].ends_with("from `parameter 6` on"),
        "{differences:?}"
    );
}

/// Adapters and tasks are for one base, in its parameters and its settings.
#[test]
fn adapters_know_the_settings_of_their_base() {
    let mut tuned = model();
    peft::attach(&mut tuned, &Peqa::new()).unwrap();
    let (adapters, task) = (Adapters::of(&tuned).unwrap(), TaskPack::of(&tuned).unwrap());
    let mut other = model();
    other.heads = 1;
    let mut tasks = peft::Tasks::new(other.clone()).unwrap();
    for error in [
        peft::activate(&mut other, &adapters).unwrap_err(),
        tasks.insert("task", task).unwrap_err(),
    ] {
        assert_eq!(
            error.to_string(),
            "made for another base: heads is 1 where 2 is expected; load the model that it was made with"
        );
    }
}

#[test]
fn a_certificate_without_layers_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("certificate.json");
    let (merged, certificate) = merged();
    certificate.save(&path).unwrap();
    let loaded = Certificate::load(&path).unwrap();
    assert_eq!(loaded, certificate);
    loaded.verify(&merged).unwrap();
    let json = serde_json::to_value(&certificate).unwrap();
    type Edit = fn(&mut serde_json::Value);
    let edits: [(&str, Edit); 7] = [
        ("lists no merged layers", |json| {
            json["layers"] = serde_json::json!([])
        }),
        ("lists layer `proj` twice", |json| {
            let layer = json["layers"][0].clone();
            json["layers"].as_array_mut().unwrap().push(layer);
        }),
        ("format_version is 4", |json| {
            json["format_version"] = 4.into()
        }),
        ("format_version is 0", |json| {
            json["format_version"] = 0.into()
        }),
        ("contradict", |json| {
            json["merged"] = json["merged"]["parameters"].clone()
        }),
        ("contradict", |json| json["format_version"] = 1.into()),
        ("contradict", |json| json["format_version"] = 2.into()),
    ];
    for (expected, edit) in edits {
        let mut json = json.clone();
        edit(&mut json);
        fs::write(&path, json.to_string()).unwrap();
        let error = Certificate::load(&path).unwrap_err();
        let is_file = matches!(&error, Error::File(tensor_files::Error::File { path: at, .. }) if *at == path);
        assert!(is_file && error.to_string().contains(expected), "{error}");
    }
    let mut json = json;
    json["layers"][0]["path"] = "other".into();
    let other: Certificate = serde_json::from_value(json).unwrap();
    let error = other.verify(&merged).unwrap_err();
    assert!(
        matches!(&error, Error::NotCertified { path } if path == "other"),
        "{error}"
    );
}

/// JSON has no numbers that are not finite: a diverged model keeps its certificate nevertheless.
#[test]
fn a_certificate_with_infinite_numbers_is_read_again() {
    let (merged, mut certificate) = merged();
    certificate.probe = Some(Probe {
        n_logits: 1,
        max_adapter_change: f64::INFINITY,
        max_merge_change: 0.5,
        retention: f64::NAN,
    });
    let json = serde_json::to_string(&certificate).unwrap();
    let again: Certificate = serde_json::from_str(&json).unwrap();
    let probe = again.probe.unwrap();
    assert!(probe.max_adapter_change.is_nan() && probe.retention.is_nan());
    assert_eq!(probe.max_merge_change, 0.5);
    again.verify(&merged).unwrap();

    certificate.layers.clear();
    let error = certificate.verify(&merged).unwrap_err();
    assert!(matches!(error, Error::Certificate { .. }), "{error}");
}

/// A fingerprint states all parts of its version, and nothing else.
#[test]
fn fingerprints_with_other_parts_are_refused() {
    let base = serde_json::to_value(Fingerprint::of(&model())).unwrap();
    for part in ["parameters", "structure", "settings"] {
        let mut other = base.clone();
        other.as_object_mut().unwrap().remove(part);
        assert!(
            serde_json::from_value::<Fingerprint>(other).is_err(),
            "{part}"
        );
    }
    for running in ["0123456", "0123456g", "+1234567"] {
        let mut other = base.clone();
        other["running"] = running.into();
        let read = serde_json::from_value::<Fingerprint>(other);
        assert!(read.is_err(), "{running}");
    }
    let mut other = base.clone();
    other["setings"] = serde_json::json!({});
    assert!(serde_json::from_value::<Fingerprint>(other).is_err());
    assert_eq!(
        serde_json::from_value::<Fingerprint>(base).unwrap(),
        Fingerprint::of(&model())
    );
}

/// Adapters of an older file cover less, and hide no difference between others.
#[test]
fn a_sum_of_adapters_is_for_the_base_that_is_known_best() {
    let adapted = |heads: usize| {
        let mut model = model();
        model.heads = heads;
        peft::attach(&mut model, &Lora::new(1)).unwrap();
        Adapters::of(&model).unwrap()
    };
    let (two, one) = (adapted(2), adapted(1));
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("old");
    two.save(&dir).unwrap();
    let path = dir.join("adapter_config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    json["format_version"] = 3.into();
    json["base"] = json["base"]["parameters"].clone();
    fs::write(&path, json.to_string()).unwrap();
    let old = Adapters::load(&dir, &Device::flex()).unwrap();
    let sum = Adapters::combined(&[(&old, 1.0), (&two, 1.0), (&old, 1.0)]).unwrap();
    assert_eq!(sum.base(), two.base());
    let error = Adapters::combined(&[(&old, 1.0), (&two, 1.0), (&one, 1.0)]).unwrap_err();
    assert!(matches!(error, Error::OtherBase { .. }), "{error}");
}
