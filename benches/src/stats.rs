//! What stands for many runs.

/// Which of the runs' values stands for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Summary {
    /// The middle one; of an even number, halfway between the two in the middle.
    Median,
    /// The smallest that 95 % of them do not exceed.
    P95,
    /// The largest.
    Largest,
}

impl Summary {
    /// Its value over `values`; none if there are none, or one of them is no number.
    pub(crate) fn of(self, values: &[f64]) -> Option<f64> {
        if values.iter().any(|value| value.is_nan()) {
            return None;
        }
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        match self {
            Self::Median => {
                let upper = sorted.get(sorted.len() / 2)?;
                let lower = sorted.get((sorted.len() - 1) / 2)?;
                Some(f64::midpoint(*lower, *upper))
            }
            Self::P95 => sorted.get((sorted.len() * 95).div_ceil(100).checked_sub(1)?).copied(),
            Self::Largest => sorted.last().copied(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Summary::{Largest, Median, P95};

    #[test]
    fn the_median_is_in_the_middle_whatever_the_order() {
        assert_eq!(Median.of(&[9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(Median.of(&[4.0, 1.0, 2.0, 100.0]), Some(3.0));
        assert_eq!(Median.of(&[7.0]), Some(7.0));
    }

    #[test]
    fn the_95th_percentile_is_a_value_that_was_measured() {
        let twenty: Vec<f64> = (1..=20).rev().map(f64::from).collect();
        assert_eq!(P95.of(&twenty), Some(19.0));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(P95.of(&hundred), Some(95.0));
        assert_eq!(P95.of(&[3.0, 8.0]), Some(8.0));
        assert_eq!(Largest.of(&[3.0, 8.0, 1.0]), Some(8.0));
    }

    #[test]
    fn nothing_measured_is_no_figure() {
        for summary in [Median, P95, Largest] {
            assert_eq!(summary.of(&[]), None);
            assert_eq!(summary.of(&[1.0, f64::NAN]), None);
        }
    }
}
