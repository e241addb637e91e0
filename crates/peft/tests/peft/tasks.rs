use peft::{Error, Fingerprint, Linears, Lora, Peqa, Targets, TaskPack, Tasks, Weight};
use proptest::prelude::*;
use quant_core::Rtn;
use tensor_files::{FloatType, LazyTensor};

use crate::cases::{Base, Case, Tuning, tasks};
use crate::model::{Bigram, adapted, dense, logits, quantized, tune};
use crate::property;

/// The least magnitude of a scale or a zero that is not 0.
fn least(model: &Bigram) -> f64 {
    let mut least = f64::INFINITY;
    for (_, linear) in model.linears() {
        let Weight::Quant(weight) = linear.weight() else {
            continue;
        };
        for values in [Some(weight.scales()), weight.zeros()]
            .into_iter()
            .flatten()
        {
            let values = values.into_data().try_into_vec::<f32>().unwrap();
            let magnitudes = values.into_iter().map(|value| f64::from(value).abs());
            least = magnitudes
                .filter(|&value| value > 0.0)
                .fold(least, f64::min);
        }
    }
    least
}

proptest! {
    #![proptest_config(property(64))]

    /// Tasks on one base: each is the merged model, bit for bit, whatever was there before it.
    #[test]
    fn tasks_are_the_merged_models(cases in tasks(), seed in 0..1000u64) {
        let dir = tempfile::tempdir().unwrap();
        let (rtn, tunings) = cases;
        let base = quantized(seed, &rtn);
        let fingerprint = Fingerprint::of(&base);
        let mut served = Tasks::new(base.clone()).unwrap();
        let mut merged = Vec::new();
        for (at, tuning) in tunings.iter().enumerate() {
            let case = Case { tuning: tuning.clone(), base: Base::Rtn(rtn) };
            let mut model = base.clone();
            // A task may leave layers as they are.
            let targets = match at {
                0 => Targets::All,
                _ => Targets::from(["down"]),
            };
            peft::attach(&mut model, &*case.method(targets)).unwrap();
            tune(&mut model, seed + at as u64);
            let pack = TaskPack::of(&model).unwrap();
            prop_assert_eq!(pack.base(), &fingerprint);
            let path = dir.path().join(format!("{at}"));
            pack.save(&path).unwrap();
            prop_assert_eq!(&TaskPack::load(&path).unwrap(), &pack);
            let (rounded, change) = pack.clone().rounded_to_f16().unwrap();
            // Below the normal numbers of f16, their steps are 2⁻²⁴.
            let mut tuned = model.clone();
            peft::merge(&mut tuned).unwrap();
            let bound = 2f64.powi(-11).max(2f64.powi(-25) / least(&tuned));
            prop_assert!(change <= bound, "{} {}", change, bound);
            prop_assert_eq!(rounded.n_values(), pack.n_values());
            let half = dir.path().join(format!("{at}-f16"));
            rounded.save(&half).unwrap();
            let n_bytes = |dir: &std::path::Path| {
                std::fs::metadata(dir.join("task.safetensors")).unwrap().len() as usize
            };
            // Scales that were trained in f16 are stored so.
            let is_f16 = matches!(tuning, Tuning::Peqa(peqa)
                if *peqa == Peqa::new().with_f16_scales(true));
            prop_assert_eq!(n_bytes(&half) < n_bytes(&path), !is_f16);
            prop_assert_eq!(TaskPack::load(&half).unwrap(), rounded);
            served.insert(format!("{at}"), pack).unwrap();
            peft::merge(&mut model).unwrap();
            merged.push(model);
        }
        for at in [1, 0, 1] {
            served.activate(&*format!("{at}")).unwrap();
            prop_assert_eq!(Fingerprint::of(served.model()), Fingerprint::of(&merged[at]));
            prop_assert_eq!(logits(served.model()), logits(&merged[at]));
        }
        let error = served.activate("2").unwrap_err();
        let named = matches!(&error, Error::UnknownTask { name, names } if name == "2" && names == &["0", "1"]);
        prop_assert!(named, "{}", error);
        served.activate(None).unwrap();
        prop_assert_eq!(Fingerprint::of(served.model()), fingerprint);
    }
}

#[test]
fn damaged_and_strange_tasks_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = adapted(1);
    tune(&mut model, 1);
    let pack = TaskPack::of(&model).unwrap();
    let stranger = quantized(2, &Rtn::new().with_bits(3).with_group_size(4));
    let mut tasks = Tasks::new(stranger).unwrap();
    let error = tasks.insert("task", pack.clone()).unwrap_err();
    assert!(matches!(error, Error::OtherBase { .. }), "{error}");
    assert!(matches!(
        Tasks::new(model),
        Err(Error::AlreadyAdapted { .. })
    ));
    assert!(matches!(TaskPack::of(&dense(1)), Err(Error::NoAdapters)));
    let mut lora = quantized(1, &Rtn::new());
    peft::attach(&mut lora, &Lora::new(1)).unwrap();
    assert!(matches!(
        TaskPack::of(&lora),
        Err(Error::MergeIntoPacked { .. })
    ));
    let mut lora = dense(1);
    peft::attach(&mut lora, &Lora::new(1)).unwrap();
    assert!(matches!(
        TaskPack::of(&lora),
        Err(Error::NeedsQuantized { .. })
    ));

    let edited = |name: &str, from: &str, to: &str| {
        let path = dir.path().join(name);
        pack.save(&path).unwrap();
        let file = path.join("task.json");
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(&file, text.replacen(from, to, 1)).unwrap();
        TaskPack::load(&path)
    };
    assert!(edited("same", "scales", "scales").is_ok());
    for (name, from, to) in [
        ("part", "scales", "biases"),
        ("layer", "mlp.down", "mlp.gate"),
        ("version", "\"format_version\": 3", "\"format_version\": 7"),
        ("json", "{", "["),
    ] {
        let error = edited(name, from, to).unwrap_err();
        let refused = matches!(
            error,
            Error::File(tensor_files::Error::File { .. })
                | Error::File(tensor_files::Error::MissingTensor { .. })
        );
        assert!(refused, "{name}: {error}");
    }
    let path = dir.path().join("extra");
    pack.save(&path).unwrap();
    let values = || vec![0.5; 4];
    let tensors = ["mlp.up.scales", "mlp.down.scales", "mlp.gate.scales"].map(|name| {
        (
            name.to_string(),
            LazyTensor::floats_as(FloatType::F32, [2, 2], values),
        )
    });
    tensor_files::write_tensors(&path.join("task.safetensors"), tensors).unwrap();
    let error = TaskPack::load(&path).unwrap_err();
    assert!(
        matches!(error, Error::File(tensor_files::Error::Tensor { .. })),
        "{error}"
    );
    // Of the right base, with a layer of another shape.
    let tensors = ["mlp.up.scales", "mlp.down.scales"].map(|name| {
        (
            name.to_string(),
            LazyTensor::floats_as(FloatType::F32, [2, 2], values),
        )
    });
    tensor_files::write_tensors(&path.join("task.safetensors"), tensors).unwrap();
    let small = TaskPack::load(&path).unwrap();
    let mut tasks = Tasks::new(quantized(1, &Rtn::new().with_bits(3).with_group_size(4))).unwrap();
    let error = tasks.insert("small", small).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    assert!(tasks.insert("task", pack).unwrap().is_none());
    assert_eq!(tasks.names().collect::<Vec<_>>(), ["task"]);
}
