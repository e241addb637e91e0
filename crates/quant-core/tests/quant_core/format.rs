//! Formats that exist, and those that do not.

use quant_core::{DoubleQuant, Error, Format, Grid, Quantizer, Rtn, ScaleLevels};

use crate::cases::tensor;

#[test]
fn formats_that_do_not_exist_are_refused() {
    let weight = || tensor(vec![1.0; 8], [8, 1]);
    for bits in [0, 1, 5, 6, 7, 9, 16, usize::MAX] {
        assert_eq!(
            Rtn::new()
                .with_bits(bits)
                .quantize(weight(), None)
                .unwrap_err(),
            Error::Bits { bits }
        );
    }
    let error = Rtn::new()
        .with_group_size(0)
        .quantize(weight(), None)
        .unwrap_err();
    assert_eq!(error, Error::EmptyGroup);
    let error = Rtn::new()
        .with_group_size(9)
        .quantize(weight(), None)
        .unwrap_err();
    assert_eq!(
        error,
        Error::GroupSize {
            group_size: 9,
            d_in: 8
        }
    );
    let format = |bits, grid| Format::new(bits, Some(32), grid).unwrap_err();
    for (bits, grid) in [
        (8, Grid::NormalFloat),
        (3, Grid::Float4),
        (8, Grid::NormalFloatByBits),
    ] {
        assert_eq!(format(bits, grid), Error::GridBits { bits, grid });
    }
    let affine = Format::new(4, Some(32), Grid::Affine).unwrap();
    assert!(affine.with_double_quant(DoubleQuant::dynamic()).is_err());
    let unsigned = |bits, block_size| DoubleQuant {
        levels: ScaleLevels::Unsigned { bits },
        block_size,
    };
    let nf4 = Format::new(4, Some(64), Grid::NormalFloat).unwrap();
    for bad in [unsigned(1, 8), unsigned(9, 8), unsigned(4, 0)] {
        assert!(nf4.with_double_quant(bad).is_err());
    }
    let double = nf4.with_double_quant(unsigned(4, 16)).unwrap();
    let json = serde_json::to_string(&double).unwrap();
    assert_eq!(serde_json::from_str::<Format>(&json).unwrap(), double);
    let json = r#"{"bits":5,"group_size":null,"grid":"affine"}"#;
    assert!(serde_json::from_str::<Format>(json).is_err());
}
