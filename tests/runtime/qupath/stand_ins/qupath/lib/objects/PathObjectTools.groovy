package qupath.lib.objects

import java.awt.geom.AffineTransform

class PathObjectTools {

    static PathObject transformObject(PathObject pathObject, AffineTransform transform, boolean copyMeasurements) {
        assert copyMeasurements
        new PathObject(feature: pathObject.feature, shift: [transform.translateX, transform.translateY])
    }

}
