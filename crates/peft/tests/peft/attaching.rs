use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor};
use peft::{
    Adapters, Error, Fingerprint, FitConfig, Linear, Linears, Lora, Peqa, Targets, TaskPack,
    Weight, fit,
};
use proptest::prelude::*;
use quant_core::Rtn;

use crate::cases::any_cases;
use crate::model::{HIDDEN, VOCAB, WIDTH, batch, dense, logits, quantized, tune};
use crate::property;

proptest! {
    #![proptest_config(property(64))]

    /// Attaching changes no bit, or is refused and changes nothing.
    #[test]
    fn attaching_is_neutral(case in any_cases(), seed in 0..1000u64) {
        let mut model = case.base.model(seed);
        let (base, before) = (Fingerprint::of(&model), logits(&model));
        let attached = peft::attach(&mut model, &*case.method(Targets::All));
        prop_assert_eq!(attached.is_ok(), case.merge().is_some(), "{:?}", attached);
        prop_assert_eq!(Fingerprint::of(&model), base);
        prop_assert_eq!(logits(&model), before);
        match attached {
            Ok(attached) => {
                prop_assert_eq!(attached.paths, ["mlp.up", "mlp.down"]);
                prop_assert!(attached.n_trainable > 0);
            }
            Err(error) => {
                prop_assert!(matches!(
                    &error,
                    Error::NeedsQuantized { path, .. }
                    | Error::Tiles { path, .. }
                    | Error::Zeros { path, .. }
                    | Error::ScalesNotF16 { path }
                        if path == "mlp.up"
                ), "{}", error);
                prop_assert!(model.linears().iter().all(|(_, linear)| linear.adapter().is_none()));
            }
        }
    }
}

#[test]
fn what_cannot_be_adapted_is_refused_and_left_alone() {
    let mut model = dense(1);
    let before = logits(&model);
    let error = peft::attach(&mut model, &Peqa::new()).unwrap_err();
    assert!(
        matches!(&error, Error::NeedsQuantized { path, .. } if path == "mlp.up"),
        "{error}"
    );
    let batches = [batch(1, [2, 9])];
    let error = fit(&mut model, &batches, &FitConfig::new(), |_, _| {}).unwrap_err();
    assert!(matches!(error, Error::NothingToTrain));
    assert_eq!(logits(&model), before);

    let mut model = quantized(1, &Rtn::new());
    let error = peft::attach(&mut model, &Peqa::new().with_targets(["up", "q_proj"])).unwrap_err();
    let named = matches!(&error, Error::NoTarget { targets, names, .. }
        if targets == &["q_proj"] && names == &["down", "up"]);
    assert!(named, "{error}");
    assert!(matches!(peft::merge(&mut model), Err(Error::NoAdapters)));
    assert!(matches!(Adapters::of(&model), Err(Error::NoAdapters)));
    peft::attach(&mut model, &Peqa::new().with_targets(["down"])).unwrap();
    let error = peft::attach(&mut model, &Peqa::new()).unwrap_err();
    assert!(
        matches!(&error, Error::AlreadyAdapted { path } if path == "mlp.down"),
        "{error}"
    );
    assert!(model.up.adapter().is_none());
    let error = model.up.quantize("mlp.up", &Rtn::new(), None).unwrap_err();
    assert!(matches!(error, Error::AlreadyQuantized { .. }));
    let error = fit(&mut model, &[], &FitConfig::new(), |_, _| {}).unwrap_err();
    assert!(matches!(error, Error::NoBatches));
    let config = FitConfig::new().with_steps(Some(3)).with_warmup_steps(4);
    let error = fit(&mut model, &batches, &config, |_, _| {}).unwrap_err();
    assert!(matches!(
        error,
        Error::Setting {
            setting: "warmup_steps",
            ..
        }
    ));
}

#[test]
fn dense_layers_run_without_a_grid() {
    let device = Device::flex();
    let weight = Tensor::random([6, 3], Distribution::Default, &device);
    let linear = Linear::new(Weight::frozen(weight.clone()), None);
    let x = Tensor::<3>::random([2, 4, 6], Distribution::Default, &device);
    let expected = x.clone().matmul(weight.unsqueeze());
    linear
        .forward(x)
        .into_data()
        .assert_approx_eq::<f32>(&expected.into_data(), Default::default());
}

/// What would be trained outside of adapters is counted and named, and adapters are not taken without it.
#[test]
fn parameters_outside_of_adapters_are_counted_and_frozen() {
    let trainable = || {
        let mut model = quantized(1, &Rtn::new().with_group_size(32));
        model.embedding = model.embedding.set_require_grad(true);
        model
    };
    let mut model = trainable();
    let (base, before) = (Fingerprint::of(&model), logits(&model));
    let attached = peft::attach(&mut model, &Peqa::new()).unwrap();
    assert_eq!(attached.n_trainable_outside, VOCAB * HIDDEN);
    let n_adapters = WIDTH * HIDDEN / 32 * 2;
    assert_eq!(attached.n_trainable, n_adapters);
    let errors = [
        Adapters::of(&model).unwrap_err(),
        peft::detach(&mut model).unwrap_err(),
        TaskPack::of(&model).unwrap_err(),
    ];
    for error in errors {
        let named = matches!(&error, Error::TrainableOutside { parameters } if parameters == &["embedding"]);
        assert!(named, "{error}");
        let said = error.to_string();
        let expected = "`embedding` is trainable outside of the adapters, which do not hold it; call `peft::freeze_base`";
        assert!(said.starts_with(expected), "{said}");
    }

    // Frozen, the model is the same, and training leaves the base as it was.
    peft::freeze_base(&mut model);
    assert_eq!(Fingerprint::of(&model), base);
    assert_eq!(logits(&model), before);
    tune(&mut model, 1);
    assert_ne!(logits(&model), before);
    assert_eq!(Fingerprint::of(&model), base);
    let adapters = Adapters::of(&model).unwrap();
    let tuned = logits(&model);
    let mut again = quantized(1, &Rtn::new().with_group_size(32));
    peft::activate(&mut again, &adapters).unwrap();
    assert_eq!(logits(&again), tuned);

    // Trained beside the adapters, it belongs to the base: frozen afterwards, both can be kept.
    let mut model = trainable();
    peft::attach(&mut model, &Peqa::new()).unwrap();
    tune(&mut model, 1);
    peft::freeze_base(&mut model);
    assert_ne!(Fingerprint::of(&model), base);
    let (tuned, adapters) = (logits(&model), peft::detach(&mut model).unwrap());
    peft::activate(&mut model, &adapters).unwrap();
    assert_eq!(logits(&model), tuned);
}

/// Dense weights and biases count too; the names are those of the fields, without variants of enums.
#[test]
fn trainable_weights_are_named() {
    let mut model = dense(1).unfreeze();
    let attached = peft::attach(&mut model, &Lora::new(1)).unwrap();
    let (embedding, weights) = (VOCAB * HIDDEN, 2 * HIDDEN * WIDTH);
    assert_eq!(attached.n_trainable_outside, embedding + weights + WIDTH);
    let error = Adapters::of(&model).unwrap_err();
    let named = matches!(&error, Error::TrainableOutside { parameters }
        if parameters == &["embedding", "up.weight", "up.bias", "down.weight"]);
    assert!(named, "{error}");
    let said = error.to_string();
    assert!(
        said.contains("`embedding`, `up.weight`, `up.bias` and 1 more parameters are trainable"),
        "{said}"
    );
    peft::freeze_base(&mut model);
    assert_eq!(peft::detach(&mut model).unwrap().layers().count(), 2);
    let attached = peft::attach(&mut model, &Lora::new(1)).unwrap();
    assert_eq!(attached.n_trainable_outside, 0);
}
