//! Against PyTorch (`tests/golden/README.md`), and the ranges of what is trained.

use std::path::Path;

use burn::tensor::{Device, TensorData};
use peft::Weight;
use quant_core::{Quantizer, Rtn};
use serde_json::Value;

use super::*;

/// All numbers of a JSON value, in their order.
fn numbers(value: &Value) -> Vec<f32> {
    match value {
        Value::Array(values) => values.iter().flat_map(numbers).collect(),
        value => vec![value.as_f64().unwrap() as f32],
    }
}

fn matrix(value: &Value) -> Tensor<2> {
    let values = numbers(value);
    let n_rows = value.as_array().unwrap().len();
    let dims = [n_rows, values.len() / n_rows];
    Tensor::from_data(TensorData::new(values, dims), &Device::flex())
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

fn assert_near(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let bound = 1e-4 * expected.abs().max(0.1);
        assert!(
            (found - expected).abs() < bound,
            "{what}: {found}, {expected}"
        );
    }
}

#[test]
fn every_step_is_pytorchs() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/block_ap.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let weight = matrix(&golden["weight"]);
    let layer = Layer {
        path: "proj",
        weight: weight.clone(),
        gram: None,
        fisher: None,
    };
    let [bits, group_size] =
        ["bits", "group_size"].map(|key| golden[key].as_u64().unwrap() as usize);
    let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
    let plain = rtn.quantize(weight, None).unwrap().weight;
    let first = &golden["first"];
    assert_near(
        &floats(plain.scales()),
        &numbers(&first["scales"]),
        "the first scales",
    );
    let zeros = matrix(&first["zeros"]);
    let plain = plain
        .clone()
        .with_grid(plain.scales(), Some(zeros))
        .unwrap();
    let [of_grids, of_weights] = numbers(&golden["learning_rates"])[..] else {
        panic!("two rates");
    };
    let rates = Rates {
        of_grids: f64::from(of_grids),
        of_weights: f64::from(of_weights),
    };
    let mut trained = Trained::new(&layer, &plain, rates, false).unwrap();
    let batches = |key: &str| -> Vec<Tensor<2>> {
        golden[key].as_array().unwrap().iter().map(matrix).collect()
    };
    let (x, y) = (batches("x"), batches("y"));
    let losses = numbers(&golden["losses"]);
    for (step, &expected) in losses.iter().enumerate() {
        let at = step % x.len();
        let output = x[at].clone().autodiff().matmul(trained.weight());
        let loss = (output - y[at].clone().autodiff()).square().mean();
        let found = loss.clone().inner().into_scalar::<f32>();
        assert_near(&[found], &[expected], &format!("the loss of step {step}"));
        trained.step(&mut loss.backward(), step as f64 / losses.len() as f64);
    }
    let of_weight = floats(trained.grid.rows(trained.weight.val().inner()));
    assert_near(
        &of_weight,
        &numbers(&golden["trained"]),
        "the trained weight",
    );
    let computed = floats(trained.weight().inner());
    let Weight::Quant(packed) = trained.finish("proj", 1).unwrap().weight else {
        panic!("a packed weight");
    };
    let last = &golden["last"];
    let codes: Vec<f32> = packed.codes().into_iter().map(f32::from).collect();
    assert_eq!(codes, numbers(&last["codes"]));
    assert_eq!(floats(packed.zeros().unwrap()), numbers(&last["zeros"]));
    assert_near(
        &floats(packed.scales()),
        &numbers(&last["scales"]),
        "the scales",
    );
    // What is packed is what was trained.
    assert_near(&floats(packed.dequantize()), &computed, "the packed weight");
}

/// Whatever the rate, what is packed is on a grid.
#[test]
fn scales_stay_positive_and_zeros_within_the_codes() {
    let values = Tensor::<1, burn::tensor::Int>::arange(0..96, &Device::flex()).float();
    let weight = (values * 0.7).sin().reshape([12, 8]) * 1e-6;
    let layer = Layer {
        path: "proj",
        weight: weight.clone(),
        gram: None,
        fisher: None,
    };
    for (symmetric, f16_scales, factor) in [
        (false, false, 1.0),
        (true, false, 1.0),
        (false, true, 1e5),
        // A hundredth of these scales is 0 in `f16`.
        (false, true, 1.0),
    ] {
        let weight = weight.clone() * factor;
        let layer = Layer {
            weight: weight.clone(),
            ..layer.clone()
        };
        let rtn = Rtn::new().with_bits(2).with_group_size(4);
        let rtn = rtn.with_symmetric(symmetric).with_f16_scales(f16_scales);
        let plain = rtn.quantize(weight.clone(), None).unwrap().weight;
        let rates = Rates {
            of_grids: 3.0,
            of_weights: 3.0,
        };
        let mut trained = Trained::new(&layer, &plain, rates, f16_scales).unwrap();
        // The start is the weight of the quantizer.
        assert_eq!(floats(trained.weight().inner()), floats(plain.dequantize()));
        for step in 0..4 {
            let sign = if step < 2 { 1.0 } else { -1.0 };
            let loss = trained.weight().square().sum() * sign;
            trained.step(&mut loss.backward(), f64::from(step) / 4.0);
            let ratio = floats(trained.grids.scales.val().inner() / trained.first_scales.clone());
            assert!(
                ratio.iter().all(|ratio| (0.0099..101.0).contains(ratio)),
                "{ratio:?}"
            );
            if let Some(zeros) = &trained.grids.zeros {
                let zeros = floats(zeros.val().inner());
                assert!(
                    zeros.iter().all(|zero| (0.0..=3.0).contains(zero)),
                    "{zeros:?}"
                );
            }
        }
        let Weight::Quant(packed) = trained.finish("proj", 1).unwrap().weight else {
            panic!("a packed weight");
        };
        assert_eq!(packed.format(), plain.format());
        let stored = quant_core::StoredGrid::new().with_f16_scales(f16_scales);
        assert!(stored.holds(&packed));
    }
}
