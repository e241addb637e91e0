//! Packed weights from parts and on given grids.

use burn::module::Module;
use burn::tensor::Device;
use quant_core::{
    DoubleQuant, Error, Grid, NormalFloat, Parts, QuantTensor, Quantizer, Rtn, Scales,
};

use crate::cases::{scattered, tensor};

#[test]
fn parts_that_do_not_fit_are_refused() {
    let packed = Rtn::new()
        .with_bits(3)
        .quantize(tensor(vec![1.0; 12], [6, 2]), None)
        .unwrap()
        .weight;
    let (format, parts) = (packed.format(), packed.to_parts());
    let make = |parts: Parts, dims| QuantTensor::from_parts(parts, format, dims, &Device::flex());
    assert!(make(parts.clone(), [6, 2]).is_ok());
    let length = |what, expected, found| Error::Length {
        what,
        expected,
        found,
    };
    let error = make(parts.clone(), [12, 2]).unwrap_err();
    assert_eq!(error, length("words", 128, 64));
    let error = make(
        Parts {
            scales: Scales::Float(vec![1.0]),
            ..parts.clone()
        },
        [6, 2],
    )
    .unwrap_err();
    assert_eq!(error, length("scales", 2, 1));
    let error = make(
        Parts {
            zeros: None,
            ..parts.clone()
        },
        [6, 2],
    )
    .unwrap_err();
    assert_eq!(
        error,
        Error::Zeros {
            grid: Grid::Affine,
            found: false
        }
    );
    let error = make(
        Parts {
            scales: Scales::Float(vec![1.0, f32::NAN]),
            ..parts.clone()
        },
        [6, 2],
    )
    .unwrap_err();
    assert!(matches!(
        error,
        Error::NonFinite {
            what: "the scales",
            column: 1,
            ..
        }
    ));
    let error = make(parts, [usize::MAX, 2]).unwrap_err();
    assert!(matches!(error, Error::Size { .. }));
}

/// On the grid that a quantizer found, a weight has the quantizer's codes.
#[test]
fn a_weight_is_rounded_to_a_grid_found_elsewhere() {
    let weight = scattered([30, 8]);
    for symmetric in [false, true] {
        let rtn = Rtn::new()
            .with_bits(3)
            .with_group_size(8)
            .with_symmetric(symmetric);
        let packed = rtn.quantize(weight.clone(), None).unwrap().weight;
        let on_grid =
            |scales, zeros| QuantTensor::on_grid(weight.clone(), packed.format(), scales, zeros);
        let found = on_grid(packed.scales(), packed.zeros()).unwrap();
        assert_eq!(found.codes(), packed.codes());
        let error = on_grid(packed.scales() * 0.0, packed.zeros()).unwrap_err();
        assert!(
            matches!(
                error,
                Error::NoGrid {
                    what: "the scales",
                    ..
                }
            ),
            "{error}"
        );
        match packed.zeros() {
            Some(zeros) => {
                let error = on_grid(packed.scales(), Some(zeros + 0.5)).unwrap_err();
                assert!(
                    matches!(
                        error,
                        Error::NoGrid {
                            what: "the zeros",
                            ..
                        }
                    ),
                    "{error}"
                );
                let error = on_grid(packed.scales(), None).unwrap_err();
                assert!(matches!(error, Error::Zeros { .. }), "{error}");
            }
            None => {
                let error = on_grid(packed.scales(), Some(packed.scales())).unwrap_err();
                assert!(matches!(error, Error::Zeros { .. }), "{error}");
            }
        }
    }
    let nf = NormalFloat::new().with_block_size(8);
    let packed = nf.quantize(weight.clone(), None).unwrap().weight;
    let error = QuantTensor::on_grid(weight.clone(), packed.format(), packed.scales(), None);
    assert!(matches!(error.unwrap_err(), Error::Scales { .. }));
    let rtn = Rtn::new().quantize(weight.clone(), None).unwrap().weight;
    let nan = weight * f32::NAN;
    let error = QuantTensor::on_grid(nan, rtn.format(), rtn.scales(), rtn.zeros());
    assert!(matches!(error.unwrap_err(), Error::NonFinite { .. }));
}

/// Each part of double-quantized scales is that of all parts.
#[test]
fn double_quantized_scales_are_read_one_by_one() {
    let nf = NormalFloat::new().with_block_size(8);
    let packed = nf.quantize(scattered([30, 7]), None).unwrap().weight;
    assert!(packed.double_scales().is_none());
    let nf = nf.with_double_quant(DoubleQuant::dynamic());
    let packed = nf.quantize(scattered([30, 7]), None).unwrap().weight;
    let Scales::Double(expected) = packed.to_parts().scales else {
        panic!("the scales are codes");
    };
    let found = packed.double_scales().unwrap();
    assert_eq!(found.codes(), expected.codes);
    assert_eq!(found.codes().len(), 4 * 7);
    assert_eq!(found.absmax(), expected.absmax);
    assert_eq!(found.offset(), expected.offset);
}

/// A weight that trains, and is asked for its scales first, leaves nothing of its device to others.
#[test]
fn double_quantized_scales_are_on_the_device_of_their_weight() {
    let nf = NormalFloat::new().with_double_quant(DoubleQuant::dynamic());
    let packed = nf.quantize(scattered([70, 7]), None).unwrap().weight;
    let trains = packed.clone().train();
    assert!(trains.scales().device().is_autodiff());
    assert!(!packed.scales().device().is_autodiff());
    assert!(!packed.device().is_autodiff());
}

/// A finite scale and a finite zero can make weights that are not.
#[test]
fn scales_whose_weights_are_beyond_f32_are_refused() {
    let device = Device::flex();
    let weight = scattered([8, 2]);
    for (bits, symmetric) in [(2, false), (4, true), (8, false), (8, true)] {
        let rtn = Rtn::new().with_bits(bits).with_symmetric(symmetric);
        let packed = rtn.with_group_size(4).quantize(weight.clone(), None);
        let packed = packed.unwrap().weight;
        let (format, parts) = (packed.format(), packed.to_parts());
        let most = if symmetric {
            1 << (bits - 1)
        } else {
            (1 << bits) - 1
        };
        // The second output of the second group.
        let with = |scale: f32, zero: f32| {
            let mut scales = vec![1.0; 4];
            scales[3] = scale;
            let zeros = parts.zeros.as_ref().map(|_| vec![0.0, 0.0, 0.0, zero]);
            let made = Parts {
                scales: Scales::Float(scales.clone()),
                zeros: zeros.clone(),
                ..parts.clone()
            };
            let made = QuantTensor::from_parts(made, format, [8, 2], &device);
            let grid = |values| tensor(values, [2, 2]);
            let moved = packed.clone().with_grid(grid(scales), zeros.map(grid));
            assert_eq!(made.as_ref().err(), moved.err().as_ref());
            made.map(drop)
        };
        let refused = |result: Result<(), Error>| {
            let found = result.unwrap_err();
            let is_named = matches!(
                found,
                Error::Overflow {
                    group: 1,
                    column: 1,
                    ..
                }
            );
            assert!(is_named, "{found:?}");
        };
        let largest = f32::MAX / most as f32;
        assert_eq!(with(largest * 0.999, 0.0), Ok(()));
        assert_eq!(with(-largest * 0.999, 0.0), Ok(()));
        refused(with(largest * 1.001, 0.0));
        refused(with(-largest * 1.001, 0.0));
        if !symmetric {
            refused(with(1e20, 1e20));
            refused(with(1e20, -1e20));
            // Half of the levels are on either side of the zero.
            assert_eq!(with(largest * 1.5, most as f32 / 2.0), Ok(()));
        }
    }
}
